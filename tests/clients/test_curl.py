"""Tests with the real curl, among them the command of the README."""

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

README_IMAGE = ROOT / "docs" / "first-image.jpg"
EXPIRED = 'X-Fal-Object-Lifecycle-Preference: {"expiration_duration_seconds": 1e-9}'


def curl(*arguments: str) -> bytes:
    """Run curl in an environment without any proxy and return its output."""
    command = ["curl", "--silent", "--show-error", *arguments]
    return subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, check=True).stdout


def run_readme_command(server: Server) -> Any:
    """Run the curl command of the README and of the quickstart with this server's port; return the result."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/quickstart.md")]
    start = "curl http://127.0.0.1:8000/fal-ai/flux/dev"
    commands = [line for text in texts for line in text.splitlines() if line.startswith(start)]
    assert len(commands) == 2
    (command,) = set(commands)
    program, *arguments = shlex.split(command.replace("http://127.0.0.1:8000", server.url))
    assert program == "curl"
    return json.loads(curl(*arguments))


def headers_and_body(output: bytes) -> tuple[int, dict[str, str], bytes]:
    """Parse the output of `curl --include` into status, headers and body."""
    head, _, body = output.partition(b"\r\n\r\n")
    status_line, *lines = head.decode().split("\r\n")
    pairs = (line.split(": ", 1) for line in lines)
    return int(status_line.split()[1]), {name.lower(): value for name, value in pairs}, body


@pytest.fixture
def image_url(server: Server) -> str:
    """Generate a small image and return its URL."""
    body = '{"prompt": "x", "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}'
    url: str = json.loads(curl(f"{server.url}/fal-ai/flux/dev", "--json", body))["images"][0]["url"]
    return url


def test_the_readme_command(server: Server) -> None:
    answer = run_readme_command(server)
    assert set(answer) == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
    assert answer["prompt"] == "a dog on a blue background"
    (image,) = answer["images"]
    assert (image["width"], image["height"], image["content_type"]) == (1024, 768, "image/jpeg")
    assert image["url"].startswith(f"{server.url}/files/")
    with Image.open(io.BytesIO(curl(image["url"]))) as actual, Image.open(README_IMAGE) as expected:
        assert (actual.size, actual.format) == ((1024, 768), "JPEG")
        # Processors round differently.
        assert numpy.abs(numpy.asarray(actual, float) - numpy.asarray(expected, float)).mean() < 3


def test_curls_default_content_type(server: Server) -> None:
    answer = json.loads(curl(f"{server.url}/test/null", "-d", '{"prompt": "a red apple"}'))
    assert answer["prompt"] == "a red apple"


def test_body_from_a_file(server: Server, tmp_path: Path) -> None:
    body = tmp_path / "request.json"
    body.write_text('{\n  "prompt": "a red apple"\n}\n')
    answer = json.loads(curl(f"{server.url}/test/null", "--data-binary", f"@{body}"))
    assert answer["prompt"] == "a red apple"


def test_queue_localhost_resolves_in_curl(server: Server) -> None:
    base = server.url.replace("127.0.0.1", "queue.localhost")
    reply = json.loads(curl(f"{base}/test/null", "-d", '{"prompt": "x"}'))
    assert reply["status_url"].startswith(f"{base}/test/null/requests/")
    assert json.loads(curl(reply["status_url"]))["request_id"] == reply["request_id"]


def test_tls_with_the_servers_certificate_authority(server: Server) -> None:
    authority = server.data_dir / "tls" / "ca.pem"
    answer = json.loads(curl("--cacert", str(authority), f"https://{server.tls_host}/health"))
    assert answer["status"] == "alive"


def test_range(image_url: str) -> None:
    whole = curl(image_url)
    status, headers, part = headers_and_body(curl("--include", "--range", "2-101", image_url))
    assert status == 206
    assert headers["content-range"] == f"bytes 2-101/{len(whole)}"
    assert part == whole[2:102]


def test_range_beyond_the_end(image_url: str) -> None:
    whole = curl(image_url)
    status, headers, body = headers_and_body(curl("--include", "--range", "10000000-", image_url))
    assert status == 416
    assert headers["content-range"].removeprefix("bytes ") == f"*/{len(whole)}"
    assert headers["content-type"] == "application/json"
    assert isinstance(json.loads(body)["detail"], str)


def test_head(image_url: str) -> None:
    status, headers, body = headers_and_body(curl("--head", image_url))
    assert (status, body) == (200, b"")
    assert headers["content-type"] == "image/jpeg"
    assert headers["content-length"] == str(len(curl(image_url)))
    assert headers["accept-ranges"] == "bytes"
    assert headers["x-content-type-options"] == "nosniff"


def test_caching_headers(image_url: str) -> None:
    _, headers, _ = headers_and_body(curl("--head", image_url))
    assert headers["etag"]
    assert "immutable" in headers["cache-control"]


def test_expired_image(server: Server) -> None:
    answer = json.loads(curl(f"{server.url}/test/null", "-H", EXPIRED, "-d", '{"prompt": "x"}'))
    status, headers, body = headers_and_body(curl("--include", answer["images"][0]["url"]))
    assert status == 404
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["detail"] == "File not found"


@pytest.mark.parametrize("name", ["", "x", "..%2Fqueue.sqlite3", "../queue.sqlite3", "0" * 32 + ".jpg", "%00", "."])
def test_unknown_file(server: Server, name: str) -> None:
    status, headers, body = headers_and_body(curl("--include", "--path-as-is", f"{server.url}/files/{name}"))
    assert status == 404
    assert headers["content-type"] == "application/json"
    assert isinstance(json.loads(body)["detail"], str)
