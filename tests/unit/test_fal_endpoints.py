"""The schema of every endpoint against fal's: fields, required fields, defaults, ranges and choices."""

from typing import Any

import pytest
from pydantic import BaseModel

from models import discover
from models.flux_fill import ImageFillInput
from models.general_parts import ControlLoraWeight, ControlNet, ControlNetUnion, ControlNetUnionInput, IPAdapter
from models.schema import EXAMPLE_IMAGE, InputURL, LoraWeight
from server.api.fal_openapi import input_and_output
from tests.support.fal_endpoints import FACTS, PARTS

MODELS = discover()
OBJECTS: list[type[BaseModel]] = [
    LoraWeight,
    ImageFillInput,
    ControlLoraWeight,
    ControlNet,
    ControlNetUnion,
    ControlNetUnionInput,
    IPAdapter,
]
#: Fields that are not in the metadata of an image: files, and what the image itself or the answer tells.
NOT_IN_METADATA = {
    "loras",
    "control_loras",
    "controlnets",
    "controlnet_unions",
    "ip_adapters",
    "fill_image",
    "image_size",
    "num_images",
    "sync_mode",
    "enable_safety_checker",
    "output_format",
    "acceleration",
    "enhance_prompt",
    "paste_back",
    "resize_to_original",
}


def id_here(endpoint: str) -> str:
    """Return the id under which the package has an endpoint of fal: stream routes belong to their endpoint."""
    return endpoint.removesuffix("/stream")


def schema_of(endpoint: str) -> dict[str, Any]:
    return input_and_output(MODELS[id_here(endpoint)])[0]


def test_the_package_has_these_endpoints_and_no_others() -> None:
    assert {id_here(endpoint) for endpoint in FACTS} == set(MODELS)
    assert len(FACTS) == 42


@pytest.mark.parametrize("endpoint", FACTS)
def test_the_fields_are_fals_in_its_order(endpoint: str) -> None:
    schema, facts = schema_of(endpoint), FACTS[endpoint]
    assert list(schema["properties"]) == list(facts)
    assert set(schema["required"]) == {name for name, fact in facts.items() if fact.get("required")}


@pytest.mark.parametrize("endpoint", FACTS)
def test_the_defaults_ranges_and_choices_are_fals(endpoint: str) -> None:
    fields = schema_of(endpoint)["properties"]
    for name, fact in FACTS[endpoint].items():
        field = fields[name]
        assert (field.get("default") or None) == fact.get("default"), name
        assert field.get("enum") == fact.get("enum"), name
        if "range" in fact:
            assert [field["minimum"], field["maximum"]] == fact["range"], name


def test_the_facts_are_those_of_all_objects_in_inputs() -> None:
    assert [kind.__name__ for kind in OBJECTS] == list(PARTS)


@pytest.mark.parametrize("kind", OBJECTS)
def test_the_objects_in_inputs_are_fals(kind: type[BaseModel]) -> None:
    schema, facts = kind.model_json_schema(), PARTS[kind.__name__]
    assert list(schema["properties"]) == list(facts)
    assert set(schema.get("required", ())) == {field for field, fact in facts.items() if fact.get("required")}
    for field, fact in facts.items():
        described = schema["properties"][field]
        assert (described.get("default") or None) == fact.get("default"), field
        assert described.get("enum") == fact.get("enum"), field


@pytest.mark.parametrize("endpoint", MODELS)
def test_every_url_is_marked_to_be_fetched(endpoint: str) -> None:
    for name in schema_of(endpoint)["properties"]:
        field = MODELS[endpoint].Input.model_fields[name]
        is_marked = any(isinstance(marker, InputURL) for marker in field.metadata)
        assert is_marked == name.endswith("_url"), name


@pytest.mark.parametrize("endpoint", MODELS)
def test_the_metadata_of_an_image_holds_the_parameters_of_its_request_without_urls(endpoint: str) -> None:
    model = MODELS[endpoint]
    known = {
        "prompt": "x",
        "image_url": EXAMPLE_IMAGE,
        "mask_url": EXAMPLE_IMAGE,
        "reference_image_url": EXAMPLE_IMAGE,
        "control_lora_image_url": EXAMPLE_IMAGE,
        "loras": [{"path": "a/b", "scale": 2}],
        "control_loras": [{"path": "a/b", "control_image_url": EXAMPLE_IMAGE}],
        "controlnets": [{"path": "a/b", "image_url": EXAMPLE_IMAGE, "conditioning_scale": 0.5}],
        "ip_adapters": [{"path": "a/b", "ip_adapter_image_url": EXAMPLE_IMAGE, "scale": 0.6}],
    }
    body = {name: value for name, value in known.items() if name in schema_of(endpoint)["properties"]}
    parameters = dict(model.metadata(model.Input.model_validate(body), 1))
    assert (parameters.pop("endpoint"), parameters["seed"]) == (endpoint, 1)
    fields = model.Input.model_fields.keys()
    assert parameters.pop("lora_scales", None) == ([2] if "loras" in fields else None)
    assert parameters.pop("control_lora_scales", None) == ([1] if "control_loras" in fields else None)
    assert parameters.pop("controlnet_scales", None) == ([0.5] if "controlnets" in fields else None)
    assert parameters.pop("ip_adapter_scales", None) == ([0.6] if "ip_adapters" in fields else None)
    published = set(schema_of(endpoint)["properties"])
    urls = {name for name in published if name.endswith("_url")}
    assert parameters.keys() == (published - urls - NOT_IN_METADATA) | {"seed", *({"prompt"} & fields)}


@pytest.mark.parametrize("endpoint", MODELS)
def test_the_description_of_a_request_tells_its_own_defaults(endpoint: str) -> None:
    fields = schema_of(endpoint)["properties"]
    description = " ".join(schema_of(endpoint)["description"].split())
    assert "Input" not in description
    assert ("4.5" in description) == (fields.get("guidance_scale", {}).get("default") == 4.5)
    assert ("`regular`" in description) == (fields.get("acceleration", {}).get("default") == "regular")


def test_the_description_of_the_strength_fits_the_endpoint() -> None:
    for endpoint in ("fal-ai/flux-lora", "fal-ai/flux-krea-lora"):
        fields = schema_of(f"{endpoint}/inpainting")["properties"]
        assert "white areas of the mask" in fields["strength"]["description"]
        assert "mask" not in schema_of(f"{endpoint}/image-to-image")["properties"]["strength"]["description"]


def test_no_two_endpoints_have_different_inputs_of_one_name() -> None:
    """The OpenAPI document of the server names schemas after their classes."""
    inputs = {model.Input for model in MODELS.values()}
    assert len({each.__name__ for each in inputs}) == len(inputs)
