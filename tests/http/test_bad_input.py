"""Bad request bodies: each receives a clear error in fal's shape, and the server keeps serving."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from models.schema import EXAMPLE_IMAGE
from tests.support.error_bodies import first_field_error
from tests.support.server_process import TEST_MODELS, serving

FLUX = "/fal-ai/flux/dev"

#: Field, value, the last part of the error's location, its type, and a word of its message.
BAD_FIELDS: list[tuple[str, Any, str, str, str]] = [
    ("prompt", None, "prompt", "string_type", "string"),
    ("prompt", 5, "prompt", "string_type", "string"),
    ("prompt", ["a"], "prompt", "string_type", "string"),
    ("prompt", {"a": 1}, "prompt", "string_type", "string"),
    ("prompt", True, "prompt", "string_type", "string"),
    ("prompt", "x" * 20_001, "prompt", "string_too_long", "20000"),
    ("num_inference_steps", 0, "num_inference_steps", "greater_than_equal", "1"),
    ("num_inference_steps", 51, "num_inference_steps", "less_than_equal", "50"),
    ("num_inference_steps", -(10**30), "num_inference_steps", "greater_than_equal", "1"),
    ("num_inference_steps", 2.5, "num_inference_steps", "int_from_float", "integer"),
    ("num_inference_steps", "many", "num_inference_steps", "int_parsing", "integer"),
    ("num_inference_steps", [4], "num_inference_steps", "int_type", "integer"),
    ("guidance_scale", 0.99, "guidance_scale", "greater_than_equal", "1"),
    ("guidance_scale", 20.01, "guidance_scale", "less_than_equal", "20"),
    ("guidance_scale", "strong", "guidance_scale", "float_parsing", "number"),
    ("num_images", 0, "num_images", "greater_than_equal", "1"),
    ("num_images", 5, "num_images", "less_than_equal", "4"),
    ("seed", -1, "seed", "greater_than_equal", "0"),
    ("seed", 2**53 - 3, "seed", "less_than_equal", str(2**53 - 4)),
    ("seed", 10**1000, "seed", "less_than_equal", str(2**53 - 4)),
    ("seed", "9" * 5000, "seed", "int_parsing_size", "integer"),
    ("seed", "lucky", "seed", "int_parsing", "integer"),
    ("sync_mode", "perhaps", "sync_mode", "bool_parsing", "boolean"),
    ("enable_safety_checker", 2, "enable_safety_checker", "bool_parsing", "boolean"),
    ("output_format", "webp", "output_format", "literal_error", "'jpeg' or 'png'"),
    ("acceleration", "warp", "acceleration", "literal_error", "'regular' or 'high'"),
    ("image_size", "huge", "image_size", "literal_error", "'landscape_16_9'"),
    ("image_size", "", "image_size", "literal_error", "'square_hd'"),
    ("image_size", 512, "image_size", "model_type", "object"),
    ("image_size", [512, 512], "image_size", "model_type", "object"),
    ("image_size", {"width": 0}, "width", "greater_than", "0"),
    ("image_size", {"height": 0}, "height", "greater_than", "0"),
    ("image_size", {"width": -512}, "width", "greater_than", "0"),
    ("image_size", {"width": 63}, "width", "greater_than_equal", "64"),
    ("image_size", {"height": 2049}, "height", "less_than_equal", "2048"),
    ("image_size", {"width": 10**9, "height": 10**9}, "width", "less_than_equal", "2048"),
    ("image_size", {"width": 10**30}, "width", "less_than_equal", "2048"),
    ("image_size", {"width": 512.5}, "width", "int_from_float", "integer"),
    ("image_size", {"width": None}, "width", "int_type", "integer"),
    ("image_size", {"width": "wide"}, "width", "int_parsing", "integer"),
]


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize(("field", "value", "where", "kind", "word"), BAD_FIELDS)
def test_bad_field(client: httpx.Client, field: str, value: Any, where: str, kind: str, word: str) -> None:
    entry = first_field_error(client.post(FLUX, json={"prompt": "x", field: value}))
    assert entry["loc"][0] == "body"
    assert entry["loc"][1] == field
    assert entry["loc"][-1] == where
    assert entry["type"] == kind
    assert word in entry["msg"]


@pytest.mark.usefixtures("server_still_works")
def test_missing_prompt(client: httpx.Client) -> None:
    entry = first_field_error(client.post(FLUX, json={}))
    assert (entry["loc"], entry["type"], entry["msg"]) == (["body", "prompt"], "missing", "Field required")


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize("path", [FLUX, f"/queue{FLUX}", f"{FLUX}/stream"])
def test_every_bad_field_is_reported_on_every_route(client: httpx.Client, path: str) -> None:
    answer = client.post(path, json={"num_images": 9, "seed": -1})
    assert {entry["loc"][-1] for entry in answer.json()["detail"]} == {"prompt", "num_images", "seed"}
    first_field_error(answer)
    for name in ("prompt", "num_images", "seed"):
        assert name in answer.json()["message"]


@pytest.mark.usefixtures("server_still_works")
def test_limits_of_the_operator(tmp_path: Path, client: httpx.Client) -> None:
    with (
        serving(tmp_path, TEST_MODELS, max_side="1000", max_pixels="500000") as server,
        httpx.Client(base_url=server.ready().url, trust_env=False) as limited,
    ):
        entry = first_field_error(
            limited.post("/test/null", json={"prompt": "x", "image_size": {"width": 1000, "height": 1000}})
        )
        assert (entry["type"], entry["ctx"]["max_pixels"]) == ("image_too_large", 500_000)
        assert "500000" in entry["msg"]
        # Both the preset landscape_4_3 and the default are 1024x768, which is too wide.
        for body in ({"prompt": "x", "image_size": "landscape_4_3"}, {"prompt": "x"}):
            entry = first_field_error(limited.post("/test/null", json=body))
            assert entry["loc"] == ["body", "image_size", "width"]
            assert "1000" in entry["msg"]


NOT_JSON = {
    "cut off": b'{"prompt": "x"',
    "plain text": b"a red apple",
    "empty": b"",
    "single quotes": b"{'prompt': 'x'}",
    "trailing comma": b'{"prompt": "x",}',
    "two documents": b'{"prompt": "x"}{"prompt": "y"}',
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "the other half": b'{"prompt": "\\udc00 x"}',
    "a line break in a string": b'{"prompt": "a\nb"}',
    "too many digits": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "too deep": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "too deep and cut off": b"[" * 50_000,
    "too deep, objects": b'{"a":' * 50_000,
    "binary": bytes(range(256)),
}


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_not_json(client: httpx.Client, body: bytes) -> None:
    entry = first_field_error(client.post(FLUX, content=body, headers={"content-type": "application/json"}))
    assert entry["type"] == "json_invalid"
    assert entry["loc"][0] == "body"
    assert 0 <= entry["loc"][1] <= len(body)


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize("path", ["/fal-ai/flux/dev", "/queue/fal-ai/flux/dev", "/v1/images/generations"])
@pytest.mark.parametrize("value", [f"[{{}}{',{}' * 100_000}]", f"[1{',1' * 100_000}]"])
def test_too_many_values(client: httpx.Client, path: str, value: str) -> None:
    response = client.post(path, content=f'{{"prompt": "x", "ignored": {value}}}')
    assert response.status_code == (400 if path.startswith("/v1") else 422)
    assert "Body should have at most 100000 values" in response.text


@pytest.mark.parametrize("path", ["/tokens", "/storage/upload/initiate", "/platform/v1/models/pricing/estimate"])
def test_routes_of_small_bodies_have_a_small_limit(client: httpx.Client, path: str) -> None:
    response = client.post(path, content=b" " * 65_537)
    assert response.status_code == 413
    assert response.json()["detail"] == "The body is larger than 65536 bytes"


def test_the_position_of_a_json_error(client: httpx.Client) -> None:
    body = b'{\n  "prompt": "x",\n  "seed": oops\n}'
    offset = first_field_error(client.post(FLUX, content=body))["loc"][1]
    assert body[offset : offset + 4] == b"oops"


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize("body", ["[]", "null", "1", '"x"', "true", '[{"prompt": "x"}]'])
def test_not_an_object(client: httpx.Client, body: str) -> None:
    entry = first_field_error(client.post(FLUX, content=body))
    assert entry["loc"] == ["body"]
    assert "object" in entry["msg"]


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize("depth", [50, 100, 150, 199])
def test_nested_deeply_but_not_too_deeply(client: httpx.Client, depth: int) -> None:
    body = '{"prompt": ' + "[" * depth + "]" * depth + "}"
    assert first_field_error(client.post(FLUX, content=body))["loc"] == ["body", "prompt"]


NOT_NUMBERS = [
    ("guidance_scale", "NaN"),
    ("guidance_scale", "Infinity"),
    ("guidance_scale", "1e400"),
    ("guidance_scale", '"nan"'),
    ("seed", "NaN"),
    ("seed", "-Infinity"),
    ("num_images", "NaN"),
    ("image_size", '{"width": NaN}'),
]


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize(("field", "value"), NOT_NUMBERS)
def test_not_a_number(client: httpx.Client, field: str, value: str) -> None:
    entry = first_field_error(client.post(FLUX, content=f'{{"prompt": "x", "{field}": {value}}}'))
    assert entry["loc"][1] == field
    assert "finite" in entry["msg"]


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "image/png", "application/xml", "?"])
def test_wrong_content_type(client: httpx.Client, kind: str) -> None:
    entry = first_field_error(client.post(FLUX, content='{"prompt": "x"}', headers={"content-type": kind}))
    assert (entry["loc"], entry["type"]) == (["body"], "model_attributes_type")
    assert "application/json" in entry["msg"]


@pytest.mark.parametrize("field", ["image_url", "mask_url"])
def test_the_image_and_the_mask_are_required(client: httpx.Client, field: str) -> None:
    body = {"prompt": "x", "image_url": EXAMPLE_IMAGE, "mask_url": EXAMPLE_IMAGE}
    del body[field]
    for endpoint in ("fal-ai/flux-lora/inpainting", "fal-ai/flux-krea-lora/inpainting"):
        (entry,) = client.post(f"/{endpoint}", json=body).json()["detail"]
        assert (entry["loc"], entry["type"]) == (["body", field], "missing")
