"""Small requests to every endpoint of fal that the package has, and the check of their outputs."""

from typing import Any

import httpx
import numpy
from openapi_schema_validator import OAS30Validator
from PIL import Image

from models.demo.recipe.export import LORA
from models.loading.specs import DEMO
from tests.support.fal_endpoints import FACTS
from tests.support.image_files import decode, encode
from tests.support.tiny_kinds import control_lora_for, control_net_for, ip_adapter_for

SIDE = 64
#: The colour of the input image, and the greatest mean difference of areas that stay as they are. The demo's
#: autoencoder changes this colour by 20.
ORANGE, TOLERANCE = (255, 165, 0), 32


def upload_inputs(client: httpx.Client) -> dict[str, Any]:
    """Upload images, LoRAs and control nets to the server; return fields that refer to them."""
    image, mask = Image.new("RGB", (SIDE, SIDE), ORANGE), Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    lora = _upload(client, (DEMO / LORA).read_bytes(), "application/octet-stream")
    control_lora = _upload(client, control_lora_for(DEMO, 3), "application/octet-stream")
    net = _upload(client, control_net_for(DEMO, 4), "application/octet-stream")
    union = _upload(client, control_net_for(DEMO, 5, num_mode=7), "application/octet-stream")
    ip_adapter = _upload(client, ip_adapter_for(DEMO, 6), "application/octet-stream")
    image_url = _upload(client, encode(image), "image/png")
    return {
        "image_url": image_url,
        "mask_url": _upload(client, encode(mask), "image/png"),
        "reference_image_url": image_url,
        "control_lora_image_url": image_url,
        "fill_image": {"fill_image_url": image_url},
        "ip_adapters": [{"path": ip_adapter, "ip_adapter_image_url": image_url}],
        "loras": [{"path": lora, "scale": 0.8}],
        "control_loras": [{"path": control_lora, "control_image_url": image_url}],
        "controlnets": [{"path": net, "image_url": image_url}],
        "controlnet_unions": [{"path": union, "controls": [{"control_image_url": image_url, "control_mode": "depth"}]}],
    }


def upload_other_inputs(client: httpx.Client) -> dict[str, Any]:
    """Upload another image and a black mask; return the fields for them, and no LoRAs."""
    image, mask = Image.new("RGB", (SIDE, SIDE), "blue"), Image.new("L", (SIDE, SIDE))
    # It has edges, which the other image has not.
    image.paste("white", (SIDE // 4, SIDE // 4, SIDE // 2, SIDE // 2))
    image_url = _upload(client, encode(image), "image/png")
    return {
        "image_url": image_url,
        "mask_url": _upload(client, encode(mask), "image/png"),
        "reference_image_url": image_url,
        "control_lora_image_url": image_url,
        "fill_image": {"fill_image_url": image_url},
        "loras": [],
        "control_loras": [],
        "controlnets": [],
        "controlnet_unions": [],
        "ip_adapters": [],
    }


def small_body(endpoint: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a request of one or two steps; `inputs` are the fields that `upload_inputs` returned."""
    facts = FACTS[endpoint]
    fewest = facts["num_inference_steps"].get("range", [1])[0]
    values = {
        "prompt": "a red apple",
        "seed": 7,
        "image_size": {"width": SIDE, "height": SIDE},
        "num_inference_steps": max(fewest, 2),
        # The share of its steps that an endpoint takes if it starts from an image: one step.
        "strength": min(0.5, 1 / fewest),
        "enable_safety_checker": False,
        "output_format": "png",
        **inputs,
    }
    return {name: value for name, value in values.items() if name in facts}


def check_output(client: httpx.Client, endpoint: str, output: Any) -> None:
    """Check an output against the schema that the server publishes for the endpoint, and its image against the request.

    Raises AssertionError, or jsonschema.exceptions.ValidationError.
    """
    response = client.get("/api/openapi/queue/openapi.json", params={"endpoint_id": endpoint}).raise_for_status()
    document = response.json()
    answers = document["paths"][f"/{endpoint.removesuffix('/stream')}/requests/{{request_id}}"]["get"]["responses"]
    schema = {**answers["200"]["content"]["application/json"]["schema"], "components": document["components"]}
    OAS30Validator(schema).validate(output)
    assert (output["seed"], len(output["images"]), output["has_nsfw_concepts"]) == (7, 1, [False])
    assert output["prompt"] == ("a red apple" if "prompt" in FACTS[endpoint] else "")
    content = httpx.get(output["images"][0]["url"], verify=False, trust_env=False).raise_for_status().content
    assert decode(content).size == (SIDE, SIDE)
    assert (output["images"][0]["width"], output["images"][0]["height"]) == (SIDE, SIDE)


def check_inputs_matter(client: httpx.Client, endpoint: str, inputs: dict[str, Any], others: dict[str, Any]) -> None:
    """Check that the image differs if any of the input files does, and that the black part of a mask stays as it is.

    `inputs` and `others` are the fields that `upload_inputs` and `upload_other_inputs` returned. Raises AssertionError.
    """
    body = small_body(endpoint, inputs)
    image = _generate(client, endpoint, body)
    names = inputs.keys() & body.keys()
    images = {name: _generate(client, endpoint, {**body, name: others[name]}) for name in names}
    for name, other in images.items():
        assert not numpy.array_equal(image, other), name
    if "mask_url" in body:
        white, black = (half.mean() for half in numpy.split(abs(image - images["mask_url"]), 2, axis=1))
        assert white > 2 * black
        assert abs(numpy.split(image, 2, axis=1)[1] - ORANGE).mean() < TOLERANCE


def _generate(client: httpx.Client, endpoint: str, body: dict[str, Any]) -> numpy.ndarray[Any, Any]:
    """Return the image of a request as numbers of shape (height, width, 3)."""
    response = client.post(f"/{endpoint.removesuffix('/stream')}", json={**body, "sync_mode": True}).raise_for_status()
    return numpy.asarray(decode(response.json()["images"][0]["url"]), dtype=float)


def _upload(client: httpx.Client, content: bytes, content_type: str) -> str:
    response = client.post("/files/upload", content=content, headers={"Content-Type": content_type})
    url: str = response.raise_for_status().json()["access_url"]
    return url
