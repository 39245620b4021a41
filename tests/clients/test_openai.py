"""Tests of OpenAI's own package against this server."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image, ImageChops, ImageStat

from server.worker.image_encoder import DIGITAL_SOURCE_TYPE
from tests.support.image_files import decode, encode
from tests.support.server_process import Gate, Server, wait_until_claimed, wait_until_completed

DEV, NULL = "fal-ai/flux/dev", "test/null"
SMALL: dict[str, Any] = {"num_inference_steps": 2}


@pytest.fixture
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with (
        openai.DefaultHttpxClient(trust_env=False, timeout=60) as client,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="local", http_client=client, max_retries=0) as sdk,
    ):
        yield sdk


def test_models(sdk: openai.OpenAI) -> None:
    ids = {model.id for model in sdk.models.list()}
    assert {DEV, "fal-ai/flux/schnell", NULL, "gpt-image-1", "gpt-image-1-mini", "dall-e-3", "dall-e-2"} <= ids
    assert sdk.models.retrieve(DEV).owned_by == "fal-ai"
    assert sdk.models.retrieve("dall-e-3").owned_by == "fal-ai"


def test_response_format_url(sdk: openai.OpenAI, client: httpx.Client) -> None:
    answer = sdk.images.generate(prompt="a red apple", size="256x192", n=2, extra_body={**SMALL, "seed": 3})
    assert answer.data is not None
    assert len(answer.data) == 2
    for image in answer.data:
        assert image.b64_json is None
        assert decode(client.get(image.url or "").content).size == (256, 192)


def test_response_format_b64_json(sdk: openai.OpenAI, client: httpx.Client) -> None:
    answer = sdk.images.generate(
        prompt="a red apple", model=DEV, size="128x96", response_format="b64_json", extra_body={**SMALL, "seed": 3}
    )
    assert answer.data is not None
    (image,) = answer.data
    assert image.url is None
    body = {"prompt": "a red apple", "seed": 3, "image_size": {"width": 128, "height": 96}, **SMALL}
    url = client.post(f"/{DEV}", json=body).json()["images"][0]["url"]
    assert base64.b64decode(image.b64_json or "") == client.get(url).content


def test_b64_responses_omit_url(client: httpx.Client) -> None:
    body = {"prompt": "", "model": NULL, "response_format": "b64_json", **SMALL}
    (datum,) = client.post("/v1/images/generations", json=body).json()["data"]
    assert datum.keys() == {"b64_json"}


def test_openai_only_parameters_are_ignored(sdk: openai.OpenAI) -> None:
    answer = sdk.images.generate(
        prompt="", model=NULL, size="auto", quality="hd", style="vivid", user="alice", background="opaque",
        moderation="low", extra_body=SMALL,
    )  # fmt: skip
    assert answer.data is not None
    assert answer.data[0].url


@pytest.mark.parametrize("model", ["gpt-image-1", "gpt-image-1-mini", "chatgpt-image-9", "dall-e-3", "dall-e-2"])
def test_openais_names_stand_for_the_default_endpoint(sdk: openai.OpenAI, client: httpx.Client, model: str) -> None:
    """Return PNG files; return them in base64 for the newer models, and as URLs for the older ones, as OpenAI does."""
    answer = sdk.images.generate(prompt="a red apple", model=model, size="128x96", extra_body={**SMALL, "seed": 3})
    assert answer.data is not None
    (image,) = answer.data
    assert bool(image.b64_json) == ("gpt-image" in model)
    content = base64.b64decode(image.b64_json) if image.b64_json else client.get(image.url or "").content
    assert json.loads(decode(content).info["parameters"])["endpoint"] == DEV
    assert decode(content).format == "PNG"


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_output_formats(sdk: openai.OpenAI, output_format: Any) -> None:
    answer = sdk.images.generate(
        prompt="", model=NULL, size="128x96", output_format=output_format, output_compression=80,
        response_format="b64_json", extra_body=SMALL,
    )  # fmt: skip
    assert answer.data is not None
    image = decode(base64.b64decode(answer.data[0].b64_json or ""))
    assert (image.format, image.size) == (output_format.upper(), (128, 96))
    assert DIGITAL_SOURCE_TYPE.encode() in image.info["xmp"]


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_output_compression_is_the_quality(sdk: openai.OpenAI, output_format: Any) -> None:
    sizes = []
    for quality in (5, 95):
        answer = sdk.images.generate(
            prompt="a red apple", model=DEV, size="128x96", output_format=output_format, output_compression=quality,
            response_format="b64_json", extra_body={**SMALL, "seed": 3},
        )  # fmt: skip
        assert answer.data is not None
        sizes.append(len(answer.data[0].b64_json or ""))
    assert sizes[0] < sizes[1]


def test_webp_in_a_stream(sdk: openai.OpenAI) -> None:
    (event,) = sdk.images.generate(prompt="", model=NULL, output_format="webp", stream=True, extra_body=SMALL)
    assert event.output_format == "webp"
    assert decode(base64.b64decode(event.b64_json)).format == "WEBP"


@pytest.mark.parametrize("num_partial", [0, 1, 3])
def test_stream(sdk: openai.OpenAI, num_partial: int) -> None:
    stream = sdk.images.generate(
        prompt="a fish", model=DEV, size="128x96", stream=True, partial_images=num_partial,
        extra_body={"num_inference_steps": 8},
    )  # fmt: skip
    *partial, last = list(stream)
    assert 0 < len(partial) <= num_partial or num_partial == 0 == len(partial)
    for number, event in enumerate(partial):
        assert event.type == "image_generation.partial_image"
        assert event.partial_image_index == number
        decode(base64.b64decode(event.b64_json))
    assert last.type == "image_generation.completed"
    assert last.size == "128x96"
    assert decode(base64.b64decode(last.b64_json)).size == (128, 96)


def test_a_disconnected_client_cancels_its_request(constrained_client: httpx.Client, gate: Gate) -> None:
    """Disconnect while the request waits behind one that never finishes."""
    first = constrained_client.post("/queue/test/gate", json={"prompt": str(gate.path)}).json()
    wait_until_claimed(constrained_client, first["status_url"])
    body = {"prompt": "", "model": NULL, "stream": True}
    with constrained_client.stream("POST", "/v1/images/generations", json=body) as answer:
        request_id = answer.headers["x-fal-request-id"]
    last = wait_until_completed(constrained_client, f"/queue/test/null/requests/{request_id}/status")
    assert last["error_type"] == "client_disconnected"


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"n": 5}, "n", "less_than_equal"),
        ({"n": 0}, "n", "greater_than_equal"),
        ({"size": "8x8"}, "size.width", "greater_than_equal"),
        ({"size": "huge"}, "size", "value_error"),
        ({"response_format": "gif"}, "response_format", "literal_error"),
        ({"num_inference_steps": 99}, "num_inference_steps", "less_than_equal"),
        ({"prompt": None}, "prompt", "string_type"),
        ({"output_format": "webp"}, "output_format", "value_error"),
        ({"output_format": "gif"}, "output_format", "literal_error"),
        ({"output_format": "jpeg", "output_compression": 50}, "output_compression", "value_error"),
        ({"output_compression": 101}, "output_compression", "less_than_equal"),
    ],
)
def test_errors_name_openais_field(client: httpx.Client, change: dict[str, Any], param: str, code: str) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": "", "model": NULL, **change})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"].startswith(f"{param}: ")


def test_an_edit_of_the_default_endpoint(sdk: openai.OpenAI) -> None:
    source = encode(Image.new("RGB", (96, 64), (0, 0, 255)))
    answer = sdk.images.edit(
        image=source, prompt="a red apple", model="gpt-image-1", size="128x96", extra_body={"num_inference_steps": 10}
    )
    assert answer.data is not None
    image = decode(base64.b64decode(answer.data[0].b64_json or ""))
    assert json.loads(image.info["parameters"])["endpoint"] == f"{DEV}/image-to-image"
    assert image.size == (128, 96)


def test_a_stream_of_an_edit_has_partial_images(sdk: openai.OpenAI) -> None:
    stream = sdk.images.edit(
        image=encode(Image.new("RGB", (128, 96))), prompt="a fish", model=DEV, stream=True, partial_images=2,
        extra_body={"num_inference_steps": 10},
    )  # fmt: skip
    *partial, last = list(stream)
    assert 0 < len(partial) <= 2
    for number, event in enumerate(partial):
        assert event.type == "image_edit.partial_image"
        assert event.partial_image_index == number
        decode(base64.b64decode(event.b64_json))
    assert last.type == "image_edit.completed"
    assert last.size == "128x96"


def test_an_edit_with_a_mask(sdk: openai.OpenAI) -> None:
    """Repaint the transparent left half with the default endpoint's weights, and keep the right half."""
    source = Image.new("RGB", (256, 256), (255, 255, 255))
    mask = Image.new("RGBA", source.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 128, 256))
    answer = sdk.images.edit(
        image=encode(source), mask=encode(mask), prompt="a red apple on a white background", model="gpt-image-1",
        extra_body={"num_inference_steps": 10, "seed": 1},
    )  # fmt: skip
    assert answer.data is not None
    image = decode(base64.b64decode(answer.data[0].b64_json or ""))
    assert json.loads(image.info["parameters"])["endpoint"] == "fal-ai/flux-lora/inpainting"
    difference = ImageChops.difference(image.convert("RGB"), source)
    repainted, kept = (ImageStat.Stat(difference.crop(half)).mean for half in ((0, 0, 128, 256), (160, 0, 256, 256)))
    # The model encodes and decodes the kept half too, so its colours are not exactly those of the source.
    assert max(kept) < 10 < 20 < min(repainted)


def test_a_variation_is_that_of_redux(sdk: openai.OpenAI) -> None:
    source = encode(Image.new("RGB", (64, 64), "blue"))
    with pytest.warns(DeprecationWarning):
        answer = sdk.images.create_variation(
            image=source, model="dall-e-2", extra_body={"size": "128x96", "response_format": "b64_json"}
        )
    assert answer.data is not None
    image = decode(base64.b64decode(answer.data[0].b64_json or ""))
    assert image.size == (128, 96)
    assert json.loads(image.info["parameters"])["endpoint"] == "fal-ai/flux/dev/redux"


def test_what_no_served_endpoint_can_do(sdk: openai.OpenAI) -> None:
    """Refuse variations of a model that has no endpoint for images in place of prompts."""
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(openai.BadRequestError, match="No endpoint with the weights of fal-ai/flux-lora-fill") as raised,
    ):
        sdk.images.create_variation(model="fal-ai/flux-lora-fill", image=encode(Image.new("RGB", (96, 64))))
    assert (raised.value.param, raised.value.code) == ("image", "feature_not_supported")


def test_errors_raise_the_packages_exceptions(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        sdk.images.generate(prompt="", model="imagen")
    with pytest.raises(openai.BadRequestError, match="num_inference_steps"):
        sdk.images.generate(prompt="", extra_body={"num_inference_steps": 99})
    with pytest.raises(openai.InternalServerError, match="This cannot be painted"):
        sdk.images.generate(prompt="told", model="test/raises", extra_body=SMALL)


def test_wrong_key(server_with_keys: Server) -> None:
    url = f"{server_with_keys.url}/v1"
    with openai.DefaultHttpxClient(trust_env=False, timeout=60) as client:
        wrong_sdk = openai.OpenAI(base_url=url, api_key="nobody", http_client=client, max_retries=0)
        with pytest.raises(openai.AuthenticationError) as raised:
            wrong_sdk.images.generate(prompt="", model=NULL)
        assert raised.value.code == "invalid_api_key"
        right_sdk = openai.OpenAI(base_url=url, api_key="alice:secret", http_client=client, max_retries=0)
        assert right_sdk.images.generate(prompt="", model=NULL, extra_body=SMALL).data
