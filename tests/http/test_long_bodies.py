"""Bodies with long data URIs, which go to temporary files while they arrive."""

import base64
import io
import json
from pathlib import Path

import httpx
import pytest
from PIL import Image

from server.inputs.spool import MAX_TEXT
from tests.support.image_files import encode, noise_image
from tests.support.server_process import Server, wait_until_completed

LARGE = encode(noise_image(400, 300))
URI = f"data:image/png;base64,{base64.b64encode(LARGE).decode()}"
ROUTES = ["/test/copy", "/queue/test/copy", "/v1/images/generations"]


def temporary_files(server: Server) -> list[Path]:
    """List the server's temporary files: those not yet complete and those no longer needed."""
    return list((server.data_dir / "inputs").glob("*.part"))


def fields(path: str, **more: object) -> dict[str, object]:
    """Return a body for test/copy, which returns its input image."""
    model = {"model": "test/copy", "response_format": "url"} if path.startswith("/v1") else {}
    return {"prompt": "", "image_url": URI, "output_format": "png", **model, **more}


def image_of(client: httpx.Client, answer: httpx.Response) -> Image.Image:
    """Return the image of an answer; for an answer of the queue, wait until the request has completed."""
    body = answer.raise_for_status().json()
    if "status_url" in body:
        wait_until_completed(client, body["status_url"])
        body = client.get(body["response_url"]).raise_for_status().json()
    found = body["images"] if "images" in body else body["data"]
    return Image.open(io.BytesIO(client.get(found[0]["url"]).content))


@pytest.mark.parametrize("path", ROUTES)
def test_a_long_data_uri(server: Server, client: httpx.Client, path: str) -> None:
    assert len(URI) > 300_000
    image = image_of(client, client.post(path, json=fields(path)))
    assert image.tobytes() == noise_image(400, 300).tobytes()
    assert temporary_files(server) == []


@pytest.mark.parametrize("path", ROUTES)
def test_long_data_in_another_field_is_refused(server: Server, client: httpx.Client, path: str) -> None:
    answer = client.post(path, json=fields(path, prompt=f"a sign with {URI}"))
    assert answer.status_code in (400, 422)
    assert "base64" in answer.text
    answer = client.post(path, json=fields(path, image_url=f"http://127.0.0.1/{URI}"))
    assert "longer than" in answer.text
    assert temporary_files(server) == []


@pytest.mark.parametrize("path", ROUTES)
def test_fields_that_no_endpoint_knows_may_be_long(client: httpx.Client, path: str) -> None:
    client.post(path, json=fields(path, mask=URI)).raise_for_status()


def test_the_rest_of_a_body_is_limited(server: Server, client: httpx.Client) -> None:
    answer = client.post("/queue/test/copy", json=fields("", other="é" * MAX_TEXT))
    assert answer.status_code == 422
    assert str(MAX_TEXT) in answer.json()["detail"][0]["msg"]
    assert temporary_files(server) == []


def test_the_same_key_and_another_body(client: httpx.Client) -> None:
    """Check that the hash that identifies a body covers the data in the body's files."""
    headers = {"idempotency-key": "long"}
    first = client.post("/queue/test/copy", json=fields(""), headers=headers).raise_for_status().json()
    again = client.post("/queue/test/copy", json=fields(""), headers=headers).raise_for_status().json()
    assert first["request_id"] == again["request_id"]
    # Only one character of the data differs.
    other = json.dumps(fields("", image_url=URI[:-9] + ("A" if URI[-9] != "A" else "B") + URI[-8:]))
    assert client.post("/queue/test/copy", content=other, headers=headers).status_code in (409, 422)


def test_an_error_quotes_the_start(client: httpx.Client) -> None:
    broken = URI[:1000] + "*" + URI[1000:]
    for url in (URI + "=", broken):
        entry = client.post("/queue/test/copy", json=fields("", image_url=url)).json()["detail"][0]
        assert entry["loc"] == ["body", "image_url"]
        assert entry["input"] == url[:1000]
