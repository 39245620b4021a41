"""The real curl, as the README shows it."""

import io
import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from tests.support.server_process import ROOT, Server

README_PICTURE = ROOT / "docs" / "first-picture.jpg"
EXPIRED = 'X-Fal-Object-Lifecycle-Preference: {"expiration_duration_seconds": 1e-9}'


def curl(*arguments: str) -> bytes:
    """What curl prints, in an environment without any proxy."""
    command = ["curl", "--silent", "--show-error", *arguments]
    return subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, check=True).stdout


def as_shown(server: Server) -> Any:
    """The README's command, with this server's port."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (shown,) = [line for line in lines if line.startswith("curl http://127.0.0.1:8000/fal-ai/flux/dev")]
    program, *arguments = shlex.split(shown.replace("http://127.0.0.1:8000", server.url))
    assert program == "curl"
    return json.loads(curl(*arguments))


def headers_and_body(output: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of `curl --include`."""
    head, _, body = output.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    named = (line.split(": ", 1) for line in lines)
    return int(first.split()[1]), {name.lower(): value for name, value in named}, body


@pytest.fixture
def url(server: Server) -> str:
    """Where a small picture is."""
    body = '{"prompt": "x", "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}'
    found: str = json.loads(curl(f"{server.url}/fal-ai/flux/dev", "--json", body))["images"][0]["url"]
    return found


def test_the_command_of_the_readme(server: Server) -> None:
    answer = as_shown(server)
    assert set(answer) == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
    assert answer["prompt"] == "a dog on a blue background"
    (image,) = answer["images"]
    assert (image["width"], image["height"], image["content_type"]) == (1024, 768, "image/jpeg")
    assert image["url"].startswith(f"{server.url}/files/")
    with Image.open(io.BytesIO(curl(image["url"]))) as picture, Image.open(README_PICTURE) as shown:
        assert (picture.size, picture.format) == ((1024, 768), "JPEG")
        # Another processor rounds otherwise.
        assert numpy.abs(numpy.asarray(picture, float) - numpy.asarray(shown, float)).mean() < 3


def test_content_type_left_to_curl(server: Server) -> None:
    answer = json.loads(curl(f"{server.url}/test/null", "-d", '{"prompt": "a red apple"}'))
    assert answer["prompt"] == "a red apple"


def test_body_from_a_file(server: Server, tmp_path: Path) -> None:
    body = tmp_path / "request.json"
    body.write_text('{\n  "prompt": "a red apple"\n}\n')
    answer = json.loads(curl(f"{server.url}/test/null", "--data-binary", f"@{body}"))
    assert answer["prompt"] == "a red apple"


def test_queue_localhost_which_curl_resolves(server: Server) -> None:
    base = server.url.replace("127.0.0.1", "queue.localhost")
    reply = json.loads(curl(f"{base}/test/null", "-d", '{"prompt": "x"}'))
    assert reply["status_url"].startswith(f"{base}/test/null/requests/")
    assert json.loads(curl(reply["status_url"]))["request_id"] == reply["request_id"]


def test_tls_with_the_servers_own_authority(server: Server) -> None:
    authority = server.data_dir / "tls" / "ca.pem"
    answer = json.loads(curl("--cacert", str(authority), f"https://{server.tls_host}/health"))
    assert answer["status"] == "alive"


def test_range(url: str) -> None:
    whole = curl(url)
    status, headers, part = headers_and_body(curl("--include", "--range", "2-101", url))
    assert status == 206
    assert headers["content-range"] == f"bytes 2-101/{len(whole)}"
    assert part == whole[2:102]


def test_range_beyond_the_end(url: str) -> None:
    whole = curl(url)
    status, headers, body = headers_and_body(curl("--include", "--range", "10000000-", url))
    assert status == 416
    assert headers["content-range"].removeprefix("bytes ") == f"*/{len(whole)}"
    assert headers["content-type"] == "application/json"
    assert isinstance(json.loads(body)["detail"], str)


def test_head(url: str) -> None:
    status, headers, body = headers_and_body(curl("--head", url))
    assert (status, body) == (200, b"")
    assert headers["content-type"] == "image/jpeg"
    assert headers["content-length"] == str(len(curl(url)))
    assert headers["accept-ranges"] == "bytes"
    assert headers["x-content-type-options"] == "nosniff"


def test_not_changed_since(url: str) -> None:
    _, headers, _ = headers_and_body(curl("--head", url))
    assert headers["etag"]
    assert "immutable" in headers["cache-control"]


def test_expired_picture(server: Server) -> None:
    answer = json.loads(curl(f"{server.url}/test/null", "-H", EXPIRED, "-d", '{"prompt": "x"}'))
    status, headers, body = headers_and_body(curl("--include", answer["images"][0]["url"]))
    assert status == 404
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["detail"] == "File not found"


@pytest.mark.parametrize("name", ["", "x", "..%2Fqueue.sqlite3", "../queue.sqlite3", "0" * 32 + ".jpg", "%00", "."])
def test_no_such_picture(server: Server, name: str) -> None:
    status, headers, body = headers_and_body(curl("--include", "--path-as-is", f"{server.url}/files/{name}"))
    assert status == 404
    assert headers["content-type"] == "application/json"
    assert isinstance(json.loads(body)["detail"], str)
