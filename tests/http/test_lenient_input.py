"""Odd input that is accepted, and requests that are sent twice."""

from typing import Any

import httpx
import pytest

from tests.support.error_bodies import first_field_error
from tests.support.server_process import wait_until_completed

FLUX = "/fal-ai/flux/dev"


def test_idempotency_key(client: httpx.Client) -> None:
    def submit(prompt: str, key: str) -> httpx.Response:
        return client.post("/queue/test/null", json={"prompt": prompt}, headers={"idempotency-key": key})

    first = submit("x", "one")
    again = submit("x", "one")
    assert again.status_code == 200
    assert again.json()["request_id"] == first.json()["request_id"]
    assert again.json()["status_url"] == first.json()["status_url"]
    other = first_field_error(submit("y", "one"))
    assert other["loc"] == ["header", "idempotency-key"]
    assert submit("y", "two").json()["request_id"] != first.json()["request_id"]
    wait_until_completed(client, first.json()["status_url"])
    assert submit("x", "one").json()["request_id"] == first.json()["request_id"]


#: Odd bodies that are accepted, with the output that each must produce.
ODD: dict[str, tuple[bytes, dict[str, Any]]] = {
    "numbers as strings": (
        b'{"prompt": "x", "seed": "42", "image_size": {"width": "512", "height": "256"}, "guidance_scale": "3.5"}',
        {"seed": 42, "size": [512, 256]},
    ),
    "whole numbers as floats": (b'{"prompt": "x", "seed": 42.0, "num_images": 2.0}', {"seed": 42, "number": 2}),
    "seed null": (b'{"prompt": "x", "seed": null}', {}),
    "image_size null": (b'{"prompt": "x", "image_size": null}', {"size": [1024, 768]}),
    "every null": (
        b'{"prompt": "x", "num_images": null, "guidance_scale": null, "num_inference_steps": null,'
        b' "output_format": null, "sync_mode": null, "enable_safety_checker": null, "acceleration": null}',
        {"number": 1},
    ),
    "half a size": (b'{"prompt": "x", "image_size": {"width": 256}}', {"size": [256, 512]}),
    "empty size": (b'{"prompt": "x", "image_size": {}}', {"size": [512, 512]}),
    "unknown fields": (b'{"prompt": "x", "negative_prompt": "y", "width": 9, "format": NaN, "loras": [{}]}', {}),
    "trailing newline": (b'{"prompt": "x"}\r\n\n', {}),
    "byte order mark": (b'\xef\xbb\xbf{"prompt": "x"}', {}),
    "duplicate keys": (b'{"prompt": "y", "seed": 1, "prompt": "x", "seed": 2}', {"seed": 2}),
    "escaped key": (b'{"\\u0070rompt": "x"}', {}),
    "booleans as strings": (b'{"prompt": "x", "enable_safety_checker": "false", "sync_mode": "no"}', {}),
    "largest seed": (b'{"prompt": "x", "seed": 9007199254740988}', {"seed": 2**53 - 4}),
    "most images": (b'{"prompt": "x", "num_images": 4, "num_inference_steps": 50}', {"number": 4}),
}


@pytest.mark.parametrize(("body", "expected"), ODD.values(), ids=ODD.keys())
def test_odd_but_accepted(client: httpx.Client, body: bytes, expected: dict[str, Any]) -> None:
    answer = client.post("/test/null", content=body)
    assert answer.status_code == 200, answer.text
    output = answer.json()
    found = {
        "seed": output["seed"],
        "size": [output["images"][0]["width"], output["images"][0]["height"]],
        "number": len(output["images"]),
    }
    assert {name: found[name] for name in expected} == expected
    assert output["prompt"] == "x"
    assert 0 <= output["seed"] < 2**53


PROMPTS = [
    "",
    " ",
    "red apple " * 200,
    "x" * 20_000,
    "\U0001f34e" * 2_000,
    "a\0b",
    "\u202eelppa",
    "<&>'\"\\",
    "e\u0301",
]


@pytest.mark.parametrize("output_format", ["jpeg", "png"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_odd_prompt(client: httpx.Client, prompt: str, output_format: str) -> None:
    answer = client.post("/test/null", json={"prompt": prompt, "output_format": output_format})
    assert answer.status_code == 200, answer.text
    assert answer.json()["prompt"] == prompt
    assert client.get(answer.json()["images"][0]["url"]).status_code == 200


@pytest.mark.parametrize("prompt", ["red apple " * 200, "\U0001f34e" * 2_000, ""])
def test_odd_prompt_with_real_classes(client: httpx.Client, prompt: str) -> None:
    arguments = {"image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}
    assert client.post(FLUX, json={"prompt": prompt, **arguments}).json()["prompt"] == prompt


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "application/vnd.api+json", "APPLICATION/JSON", ""]
)
def test_content_types_that_mean_json(client: httpx.Client, kind: str) -> None:
    answer = client.post("/test/null", content=b'{"prompt": "x"}', headers={"content-type": kind})
    assert answer.status_code == 200
