"""Tests of the fields of fal-ai/flux/dev, which equal those on fal's page of the endpoint."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from models.flux_dev import FluxDevInput, FluxDevOutput
from models.image_size import PRESETS, Limits
from models.schema import MAX_PROMPT_LENGTH, MAX_SEED

#: The page's fields in the page's order, with default and range, then the fields of fal's JavaScript types.
FIELDS: dict[str, dict[str, Any]] = {
    "prompt": {"type": "string"},
    "image_size": {"default": "landscape_4_3"},
    "num_inference_steps": {"type": "integer", "default": 28, "minimum": 1, "maximum": 50},
    "seed": {"default": None},
    "guidance_scale": {"type": "number", "default": 3.5, "minimum": 1, "maximum": 20},
    "sync_mode": {"type": "boolean", "default": False},
    "num_images": {"type": "integer", "default": 1, "minimum": 1, "maximum": 4},
    "enable_safety_checker": {"type": "boolean", "default": True},
    "output_format": {"type": "string", "default": "jpeg", "enum": ["jpeg", "png"]},
    "acceleration": {"type": "string", "default": "none", "enum": ["none", "regular", "high"]},
}


def parse(limits: Limits | None = None, **fields: Any) -> FluxDevInput:
    """Parse these fields and a prompt as a client's JSON; return the input."""
    body = json.dumps({"prompt": "x", **fields})
    return FluxDevInput.model_validate_json(body, context={"limits": limits} if limits else None)


def only_error(limits: Limits | None = None, **fields: Any) -> tuple[str, tuple[int | str, ...]]:
    """Return the type and the location of the only validation error."""
    with pytest.raises(ValidationError) as raised:
        parse(limits, **fields)
    (error,) = raised.value.errors()
    return error["type"], error["loc"]


# -- the JSON schema


def test_the_schema_lists_the_fields_in_the_order_of_the_page() -> None:
    schema = FluxDevInput.model_json_schema()
    assert list(schema["properties"]) == list(FIELDS)
    assert schema["required"] == ["prompt"]


@pytest.mark.parametrize("name", FIELDS)
def test_the_schema_shows_type_default_and_range(name: str) -> None:
    shown = FluxDevInput.model_json_schema()["properties"][name]
    assert {key: shown.get(key) for key in FIELDS[name]} == FIELDS[name]
    assert shown["description"]


def test_image_size_is_an_object_or_a_preset() -> None:
    schema = FluxDevInput.model_json_schema()
    shown = schema["properties"]["image_size"]["anyOf"]
    assert shown == [{"$ref": "#/$defs/ImageSize"}, {"type": "string", "enum": list(PRESETS)}]
    sides = schema["$defs"]["ImageSize"]["properties"]
    assert [(name, side["default"]) for name, side in sides.items()] == [("width", 512), ("height", 512)]


def test_the_output_has_the_fields_of_the_page() -> None:
    schema = FluxDevOutput.model_json_schema()
    names = ["images", "timings", "seed", "has_nsfw_concepts", "prompt"]
    assert (list(schema["properties"]), schema["required"]) == (names, names)
    image = schema["$defs"]["Image"]
    assert list(image["properties"]) == ["url", "width", "height", "content_type"]
    assert image["required"] == ["url", "width", "height"]
    assert image["properties"]["content_type"]["default"] == "image/jpeg"


# -- accepted values


def test_a_prompt_alone_is_enough() -> None:
    fields = parse()
    assert (fields.image_size.width, fields.image_size.height) == (1024, 768)
    assert (fields.num_inference_steps, fields.guidance_scale, fields.num_images) == (28, 3.5, 1)
    assert (fields.seed, fields.sync_mode, fields.enable_safety_checker) == (None, False, True)
    assert (fields.output_format, fields.acceleration) == ("jpeg", "none")


SIZES = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}


@pytest.mark.parametrize(("preset", "pixels"), SIZES.items())
def test_presets(preset: str, pixels: tuple[int, int]) -> None:
    assert SIZES == PRESETS
    size = parse(image_size=preset).image_size
    assert (size.width, size.height) == pixels


@pytest.mark.parametrize(
    ("sent", "pixels"),
    [
        ({"width": 640, "height": 480}, (640, 480)),
        ({"width": 640}, (640, 512)),
        ({"height": 640}, (512, 640)),
        ({}, (512, 512)),
        ({"width": "640", "height": 480.0}, (640, 480)),
        ({"width": 640, "height": 480, "depth": 3}, (640, 480)),
    ],
)
def test_sizes_as_objects(sent: dict[str, Any], pixels: tuple[int, int]) -> None:
    size = parse(image_size=sent).image_size
    assert (size.width, size.height) == pixels


@pytest.mark.parametrize(
    ("name", "sent", "value"),
    [
        ("num_inference_steps", "28", 28),
        ("num_inference_steps", 28.0, 28),
        ("guidance_scale", "2.5", 2.5),
        ("guidance_scale", 2, 2.0),
        ("num_images", "4", 4),
        ("seed", "42", 42),
        ("seed", 1e3, 1000),
        ("seed", 0, 0),
        ("seed", MAX_SEED, MAX_SEED),
        ("sync_mode", "true", True),
        ("sync_mode", 1, True),
        ("sync_mode", "off", False),
        ("enable_safety_checker", "false", False),
        ("prompt", "", ""),
        ("prompt", "x" * MAX_PROMPT_LENGTH, "x" * MAX_PROMPT_LENGTH),
    ],
)
def test_a_value_with_one_meaning_is_converted(name: str, sent: Any, value: object) -> None:
    found = getattr(parse(**{name: sent}), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "prompt"])
def test_null_means_not_given(name: str) -> None:
    assert parse(**{name: None}) == parse()


def test_unknown_fields_are_ignored() -> None:
    assert parse(loras=[], negative_prompt="y", _private=1) == parse()


# -- rejected values


@pytest.mark.parametrize(
    ("name", "sent", "kind"),
    [
        ("prompt", None, "string_type"),
        ("prompt", 5, "string_type"),
        ("prompt", ["x"], "string_type"),
        ("prompt", "x" * (MAX_PROMPT_LENGTH + 1), "string_too_long"),
        ("num_inference_steps", 0, "greater_than_equal"),
        ("num_inference_steps", 51, "less_than_equal"),
        ("num_inference_steps", 28.5, "int_from_float"),
        ("num_inference_steps", "many", "int_parsing"),
        ("guidance_scale", 0.9, "greater_than_equal"),
        ("guidance_scale", 20.1, "less_than_equal"),
        ("guidance_scale", float("nan"), "finite_number"),
        ("guidance_scale", float("inf"), "finite_number"),
        ("num_images", 0, "greater_than_equal"),
        ("num_images", 5, "less_than_equal"),
        ("seed", -1, "greater_than_equal"),
        ("seed", MAX_SEED + 1, "less_than_equal"),
        ("seed", 10**30, "less_than_equal"),
        ("sync_mode", "perhaps", "bool_parsing"),
        ("enable_safety_checker", 2, "bool_parsing"),
        ("output_format", "jpg", "literal_error"),
        ("output_format", "webp", "literal_error"),
        ("acceleration", "ultra", "literal_error"),
        ("image_size", "SQUARE", "literal_error"),
        ("image_size", "1024x1024", "literal_error"),
        ("image_size", 512, "model_type"),
        ("image_size", [512, 512], "model_type"),
    ],
)
def test_an_error_names_its_field(name: str, sent: Any, kind: str) -> None:
    assert only_error(**{name: sent}) == (kind, (name,))


def test_a_missing_prompt_is_an_error() -> None:
    with pytest.raises(ValidationError) as raised:
        FluxDevInput.model_validate_json("{}")
    assert [(error["type"], error["loc"]) for error in raised.value.errors()] == [("missing", ("prompt",))]


def test_the_error_for_an_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(ValidationError) as raised:
        parse(image_size="huge")
    (error,) = raised.value.errors()
    assert all(f"'{name}'" in error["msg"] for name in PRESETS)


@pytest.mark.parametrize("body", ['"x"', "[]", "5", "null"])
def test_a_body_that_is_not_an_object_is_an_error(body: str) -> None:
    with pytest.raises(ValidationError) as raised:
        FluxDevInput.model_validate_json(body)
    assert [(error["type"], error["loc"]) for error in raised.value.errors()] == [("model_type", ())]


# -- limits of the operator

LIMITS = Limits(min_side=64, max_side=2048, max_pixels=2_000_000)


@pytest.mark.parametrize("side", ["width", "height"])
@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (0, "greater_than"),
        (-8, "greater_than"),
        (63, "greater_than_equal"),
        (2049, "less_than_equal"),
        (10**9, "less_than_equal"),
        (10**30, "less_than_equal"),
        (512.5, "int_from_float"),
        (None, "int_type"),
        ("wide", "int_parsing"),
    ],
)
def test_a_side_beyond_the_limits_is_an_error(side: str, pixels: object, kind: str) -> None:
    assert only_error(LIMITS, image_size={side: pixels}) == (kind, ("image_size", side))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (2048, 64), (2000, 1000)])
def test_sizes_within_the_limits(width: int, height: int) -> None:
    size = parse(LIMITS, image_size={"width": width, "height": height}).image_size
    assert (size.width, size.height) == (width, height)


def test_the_error_for_too_large_an_area_names_the_limit() -> None:
    assert only_error(LIMITS, image_size={"width": 2000, "height": 1001}) == ("image_too_large", ("image_size",))
    with pytest.raises(ValidationError, match="2000000 pixels"):
        parse(LIMITS, image_size={"width": 2000, "height": 1001})


def test_a_preset_beyond_the_limits_is_an_error_too() -> None:
    assert only_error(Limits(max_side=1000), image_size="portrait_4_3") == ("less_than_equal", ("image_size", "height"))


def test_the_limits_apply_to_the_default_size_too() -> None:
    with pytest.raises(ValidationError):
        parse(Limits(max_side=512))


def test_a_stored_request_is_not_checked_against_the_limits() -> None:
    size = {"width": 2048, "height": 2048}
    assert parse(image_size=size).image_size.width == 2048


@pytest.mark.parametrize("size", [*PRESETS, {"width": 640, "height": 480}])
def test_a_stored_request_equals_the_original(size: object) -> None:
    fields = parse(image_size=size, seed=7, guidance_scale=2)
    assert FluxDevInput.model_validate_json(fields.model_dump_json()) == fields
    assert fields.model_dump()["image_size"] == size
