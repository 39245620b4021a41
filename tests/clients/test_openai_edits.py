"""Tests of OpenAI's own package against this server: edits and variations of images that the client uploads."""

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from server.inputs.resolver import MAX_IMAGE_BYTES
from tests.support.hostile_images import BOMB, PNG, REFUSED
from tests.support.image_files import decode, encode
from tests.support.node import JS
from tests.support.server_process import TEST_MODELS, Server, serving

NULL = "test/null"
BLUE, RED = (0, 0, 255), (255, 0, 0)
SOURCE = encode(Image.new("RGB", (160, 128), BLUE))
STEPS = {"num_inference_steps": 10}


def mask(kind: str = "PNG") -> bytes:
    """Encode a mask whose left half is transparent, so that the left half is repainted."""
    image = Image.new("RGBA", (160, 128), (0, 0, 0, 255))
    image.paste((255, 255, 255, 0), (0, 0, 80, 128))
    return encode(image, kind)


@pytest.fixture(scope="module")
def edit_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    names = "gpt-image-1=test/null,dall-e-2=test/null"
    with serving(tmp_path_factory.mktemp("edits"), TEST_MODELS, openai_models=names) as running:
        yield running.ready()


@pytest.fixture
def http(edit_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=edit_server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def sdk(edit_server: Server) -> Iterator[openai.OpenAI]:
    with (
        openai.DefaultHttpxClient(trust_env=False, timeout=60) as client,
        openai.OpenAI(base_url=f"{edit_server.url}/v1", api_key="local", http_client=client, max_retries=0) as sdk,
    ):
        yield sdk


def images(answer: Any) -> list[Image.Image]:
    return [decode(base64.b64decode(datum.b64_json)) for datum in answer.data]


def test_an_edit_without_a_mask(sdk: openai.OpenAI, http: httpx.Client) -> None:
    answer = sdk.images.edit(image=SOURCE, prompt="a red apple", model="dall-e-2", extra_body=STEPS)
    assert answer.data is not None
    (datum,) = answer.data
    edited = decode(http.get(datum.url or "").content)
    assert (edited.size, edited.getpixel((9, 9))) == ((160, 128), BLUE)


def test_an_edit_with_a_mask_repaints_where_the_mask_is_transparent(sdk: openai.OpenAI) -> None:
    answer = sdk.images.edit(image=[SOURCE], mask=mask(), prompt="", model="gpt-image-1", n=2, extra_body=STEPS)
    first, second = images(answer)
    assert (first.format, first.size) == ("PNG", (160, 128))
    assert (first.getpixel((9, 9)), first.getpixel((150, 9))) == (RED, BLUE)
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_masks_of_every_kind(sdk: openai.OpenAI, kind: str, mode: str) -> None:
    content = encode(decode(mask()).convert(mode), kind)
    edited = images(sdk.images.edit(image=SOURCE, mask=content, prompt="", model="gpt-image-1", extra_body=STEPS))[0]
    assert (edited.getpixel((9, 9)), edited.getpixel((150, 9))) == (RED, BLUE)


@pytest.mark.parametrize("files", [{}, {"mask": mask()}], ids=["no mask", "mask"])
def test_a_size(sdk: openai.OpenAI, files: dict[str, Any]) -> None:
    """Scale and crop the image for an endpoint that takes no size; let the others do it."""
    sdk_size: Any = "256x96"
    for size, expected in ((sdk_size, (256, 96)), ("auto", (160, 128))):
        answer = sdk.images.edit(image=SOURCE, prompt="", model="gpt-image-1", size=size, extra_body=STEPS, **files)
        assert images(answer)[0].size == expected


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_output_formats(sdk: openai.OpenAI, output_format: Any) -> None:
    answer = sdk.images.edit(
        image=SOURCE, prompt="", model="gpt-image-1", output_format=output_format, extra_body=STEPS
    )
    assert images(answer)[0].format == output_format.upper()


@pytest.mark.parametrize("num_partial", [0, 2])
def test_a_stream_of_an_edit(sdk: openai.OpenAI, num_partial: int) -> None:
    stream = sdk.images.edit(
        image=SOURCE, mask=mask(), prompt="", model="gpt-image-1", stream=True, partial_images=num_partial,
        extra_body=STEPS,
    )  # fmt: skip
    *partial, last = list(stream)
    # The endpoint's steps take no time, so the job may end before a preview is sent.
    # tests/clients/test_openai.py has a stream of an edit with previews.
    assert len(partial) <= num_partial
    assert {event.type for event in partial} <= {"image_edit.partial_image"}
    assert (last.type, last.size) == ("image_edit.completed", "160x128")
    assert decode(base64.b64decode(last.b64_json)).getpixel((9, 9)) == RED


def test_variations(sdk: openai.OpenAI) -> None:
    with pytest.warns(DeprecationWarning):
        answer = sdk.images.create_variation(
            image=SOURCE, model="dall-e-2", n=3, size="512x512", response_format="b64_json"
        )
    assert [image.size for image in images(answer)] == [(512, 512)] * 3


def test_openais_package_for_node(node: None, edit_server: Server, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(SOURCE)
    (tmp_path / "mask.png").write_bytes(mask())
    files = [str(tmp_path / name) for name in ("image.png", "mask.png")]
    command = ["node", "openai.mjs", f"{edit_server.url}/v1", *files]
    process = subprocess.run(command, cwd=JS, capture_output=True, text=True, timeout=90)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    (datum,) = result["generated"]["data"]
    generated = decode(base64.b64decode(datum["b64_json"]))
    assert (generated.format, generated.size) == ("WEBP", (128, 96))
    for datum in result["edited"]["data"]:
        assert decode(base64.b64decode(datum["b64_json"])).getpixel((9, 9)) == RED
    assert result["events"][-1]["type"] == "image_edit.completed"
    assert result["requestID"]
    error = result["error"]
    assert (error["name"], error["code"], error["param"]) == ("NotFoundError", "model_not_found", "model")
    assert error["requestID"]


OPAQUE = encode(Image.new("RGB", (160, 128)))
BAD_FORMS: dict[str, tuple[dict[str, str], list[tuple[str, bytes]], str, str]] = {
    "no image": ({"prompt": ""}, [("mask", mask())], "image", "missing"),
    "two images": ({"prompt": ""}, [("image[]", SOURCE), ("image[]", SOURCE)], "image", "too_long"),
    "no prompt": ({}, [("image", SOURCE)], "prompt", "missing"),
    "a mask without transparency": ({"prompt": ""}, [("image", SOURCE), ("mask", OPAQUE)], "mask", "value_error"),
    "a bomb": ({"prompt": ""}, [("image", BOMB)], "image", "image_too_large"),
    "a bomb as a mask": ({"prompt": ""}, [("image", SOURCE), ("mask", BOMB)], "mask", "image_too_large"),
    "a bomb with a size": ({"prompt": "", "size": "128x128"}, [("image", BOMB)], "image", "image_too_large"),
    "chunks": ({"prompt": ""}, [("image", REFUSED["two million chunks"][0])], "image", "image_load_error"),
    "no file": ({"prompt": ""}, [("image", b"")], "image", "unsupported_image_format"),
    "a program": ({"prompt": ""}, [("image", b"\x7fELF")], "image", "unsupported_image_format"),
    "a cut mask": ({"prompt": ""}, [("image", SOURCE), ("mask", PNG[:2000])], "mask", "image_load_error"),
    "a large file": ({"prompt": ""}, [("image", bytes(MAX_IMAGE_BYTES + 1))], "image", "file_too_large"),
    "a large mask": (
        {"prompt": ""},
        [("image", SOURCE), ("mask", bytes(MAX_IMAGE_BYTES + 1))],
        "mask",
        "file_too_large",
    ),
    "a size": ({"prompt": "", "size": "9x9"}, [("image", SOURCE)], "size.width", "greater_than_equal"),
    "a number": ({"prompt": "", "n": "five"}, [("image", SOURCE)], "n", "int_parsing"),
    "steps": (
        {"prompt": "", "num_inference_steps": "99"},
        [("image", SOURCE)],
        "num_inference_steps",
        "less_than_equal",
    ),
}


@pytest.mark.parametrize(("fields", "files", "param", "code"), BAD_FORMS.values(), ids=BAD_FORMS)
def test_bad_forms(
    edit_server: Server, http: httpx.Client, fields: dict[str, str], files: Any, param: str, code: str
) -> None:
    parts = [(name, ("image.png", content, "image/png")) for name, content in files]
    answer = http.post("/v1/images/edits", data={"model": NULL, **fields}, files=parts)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert not list((edit_server.data_dir / "inputs").glob("*.part"))


def test_bodies_that_are_no_form(http: httpx.Client) -> None:
    start = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
    for content_type, body in (
        ("application/json", b'{"prompt": ""}'),
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=x", b"no form"),
        ("multipart/form-data; boundary=x", start + b"a cut form"),
        ("multipart/form-data; boundary=x", start + b"\r\n--xy" * 1000),
        ("multipart/form-data; boundary=x", start + b"\r\n--x" + b" " * 100),
        (f"multipart/form-data; boundary={'x' * 1000}", b""),
    ):
        answer = http.post("/v1/images/edits", content=body, headers={"content-type": content_type})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] == "multipart_invalid"
        assert answer.json()["error"]["param"] is None


def test_urls_in_a_form_are_not_fetched(http: httpx.Client) -> None:
    """Use only the uploaded files: the fields of the endpoint that hold URLs are no fields of OpenAI's."""
    fields = {
        "prompt": "",
        "model": NULL,
        "image_url": "http://127.0.0.1:1/",
        "mask_url": "http://127.0.0.1:1/",
        **STEPS,
    }
    answer = http.post("/v1/images/edits", data=fields, files={"image": SOURCE})
    assert answer.status_code == 200, answer.text


def test_a_form_over_the_limit_of_bodies(http: httpx.Client) -> None:
    files = [("image[]", ("image.png", bytes(21 * 2**20), "image/png"))] * 2
    answer = http.post("/v1/images/edits", data={"prompt": ""}, files=files)
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"
