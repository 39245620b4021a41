"""Tests of LoRA files: every way to send one, rejected files, and files that are not fetched twice."""

import base64
import json
import os
import pickle
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from pytest_httpserver import HTTPServer
from safetensors.numpy import save
from werkzeug import Request, Response

from models.schema import MAX_LORAS
from server.errors import InvalidInputFile
from server.inputs import weights, weights_header
from tests.support.components import Clock, open_components, submission
from tests.support.server_process import Server, serving
from tests.unit.net.test_outbound import FORBIDDEN

LORA = "/test/lora"
GOOD = save({"transformer.x.lora_A.weight": numpy.ones((4, 8), "float32")})


@pytest.fixture(scope="module")
def hub() -> Iterator[HTTPServer]:
    """Yield a fake hub, whose URL is in the server's environment."""
    with HTTPServer() as server:
        yield server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, hub: HTTPServer) -> Iterator[Server]:
    before = os.environ.get("HF_ENDPOINT")
    os.environ["HF_ENDPOINT"] = hub.url_for("").rstrip("/")
    try:
        settings = {"outbound_allow": "127.0.0.0/8,localhost", "max_lora_mib": "12"}
        with serving(tmp_path_factory.mktemp("loras"), "test/lora=demo", **settings) as server:
            yield server.ready()
    finally:
        os.environ.pop("HF_ENDPOINT")
        if before is not None:
            os.environ["HF_ENDPOINT"] = before


@pytest.fixture
def user(running: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60, trust_env=False) as client:
        yield client


def send(client: httpx.Client, *paths: str) -> httpx.Response:
    return client.post(LORA, json={"prompt": "", "loras": [{"path": path} for path in paths]})


def assert_accepted(client: httpx.Client, *paths: str) -> None:
    response = send(client, *paths)
    assert response.status_code == 200, response.text


def rejection(client: httpx.Client, path: str) -> dict[str, Any]:
    """Send a valid file and the file at `path` in one request; return the error, which is about the second file."""
    response = send(client, data_uri(GOOD), path)
    assert response.status_code == 422, response.text
    (entry,) = response.json()["detail"]
    assert entry["loc"] == ["body", "loras", 1, "path"]
    result: dict[str, Any] = entry
    return result


def data_uri(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


def stored(server: Server) -> list[bytes]:
    return [path.read_bytes() for path in (server.data_dir / "inputs").glob("*.safetensors")]


# -- ways to send a file


def test_a_hosted_file_is_fetched_once(user: httpx.Client, running: Server, httpserver: HTTPServer) -> None:
    content, statuses = save({"x.lora_B.weight": numpy.ones((8, 4), "float16")}), list[int]()

    def respond(request: Request) -> Response:
        is_known = request.headers.get("if-none-match") == '"1"'
        statuses.append(304 if is_known else 200)
        return Response(b"" if is_known else content, statuses[-1], {"etag": '"1"'})

    httpserver.expect_request("/lora.safetensors").respond_with_handler(respond)
    for _ in range(3):
        assert_accepted(user, httpserver.url_for("/lora.safetensors"))
    assert statuses == [200, 304, 304]
    assert content in stored(running)


def test_a_file_named_eight_times_is_fetched_once(user: httpx.Client, httpserver: HTTPServer) -> None:
    requested = []

    def respond(request: Request) -> Response:
        requested.append(request.path)
        return Response(GOOD)

    httpserver.expect_request("/eight").respond_with_handler(respond)
    assert_accepted(user, *[httpserver.url_for("/eight")] * 8)
    assert requested == ["/eight"]


def test_a_header_is_read_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the server's process, the check would delay every request."""

    def fail(path: Path, kind: str) -> str:
        raise AssertionError(path)

    monkeypatch.setattr(weights_header, "problem", fail)
    (tmp_path / "a").write_bytes(GOOD)
    weights.check("lora", tmp_path / "a")
    (tmp_path / "b").write_bytes(HOSTILE["whole numbers"][0])
    with pytest.raises(InvalidInputFile, match="of type I64"):
        weights.check("lora", tmp_path / "b")


def test_too_long_a_header_stops_the_download(user: httpx.Client, httpserver: HTTPServer) -> None:
    """The server does not wait for the rest of the file, which never arrives."""
    released = threading.Event()

    def endless() -> Iterator[bytes]:
        yield struct.pack("<Q", 9 * 2**20).ljust(2**19, b" ")
        released.wait(60)
        yield b""

    httpserver.expect_request("/endless").respond_with_handler(lambda request: Response(endless()))
    try:
        assert "larger than 8 MiB" in rejection(user, httpserver.url_for("/endless"))["msg"]
    finally:
        released.set()


def test_a_changed_file_is_fetched_again(user: httpx.Client, running: Server, httpserver: HTTPServer) -> None:
    versions = [save({"x.lora_A.weight": numpy.full((4, 8), n, "float32")}) for n in range(2)]
    for number, content in enumerate(versions):
        httpserver.expect_ordered_request("/lora").respond_with_data(content, headers={"etag": f'"{number}"'})
    for content in versions:
        assert_accepted(user, httpserver.url_for("/lora"))
        assert content in stored(running)


def test_an_uploaded_file_is_accepted(user: httpx.Client) -> None:
    file_info = {"content_type": "application/octet-stream", "file_name": "a.safetensors"}
    upload = user.post("/storage/upload/initiate", json=file_info, headers={"host": "rest.fal.ai"}).json()
    user.put(upload["upload_url"], content=GOOD).raise_for_status()
    assert_accepted(user, upload["file_url"], data_uri(GOOD))


def test_a_hub_id_is_accepted(user: httpx.Client, hub: HTTPServer, running: Server) -> None:
    content = save({"hub.lora_A.weight": numpy.ones((4, 8), "float32")})
    siblings = [{"rfilename": name} for name in ("README.md", "lora.safetensors")]
    hub.expect_request("/api/models/owner/style").respond_with_json({"sha": "a1b2", "siblings": siblings})
    hub.expect_request("/owner/style/resolve/a1b2/lora.safetensors").respond_with_data(content)
    assert_accepted(user, "owner/style")
    assert content in stored(running)


def test_invalid_hub_ids_are_rejected(user: httpx.Client, hub: HTTPServer) -> None:
    for name, siblings in {"two": ["a.safetensors", "b.safetensors"], "none": ["a.bin"]}.items():
        body = {"sha": "1", "siblings": [{"rfilename": each} for each in siblings]}
        hub.expect_request(f"/api/models/owner/{name}").respond_with_json(body)
    hub.expect_request("/api/models/owner/odd").respond_with_data("[]")
    assert "has 2 safetensors files" in rejection(user, "owner/two")["msg"]
    assert "has no safetensors file" in rejection(user, "owner/none")["msg"]
    assert "description of owner/odd cannot be read" in rejection(user, "owner/odd")["msg"]
    assert "responded 500" in rejection(user, "owner/unknown")["msg"]


# -- rejected files


def header(content: object, body: bytes = b"") -> bytes:
    """Return a safetensors file with this header."""
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


ONE = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a complete safetensors file"),
    "text": (b"hello, this is no tensor", "not a safetensors file"),
    "pickle": (pickle.dumps({"x.lora_A.weight": [1.0]}), "not a safetensors file"),
    "zip": (b"PK\x03\x04" + bytes(60), "not a safetensors file"),
    "header longer than the file": (struct.pack("<Q", 10_000) + b"{}", "not a complete safetensors file"),
    "header of exabytes": (struct.pack("<Q", 2**63) + b"{}", "not a safetensors file"),
    "header that is no JSON": (header(b"{" * 100), "not a safetensors file"),
    "header nested deeply": (header(b"[" * 100_000), "not a safetensors file"),
    "outside of the file": (header({"a.lora_A.weight": ONE}), "not a safetensors file"),
    "overlapping": (header({"a.lora_A.weight": ONE, "b.lora_A.weight": ONE}, bytes(16)), "not a safetensors file"),
    "wrong size": (header({"a.lora_A.weight": {**ONE, "shape": [9, 9]}}, bytes(16)), "not a safetensors file"),
    "no LoRA": (save({"transformer.x.weight": numpy.ones((2, 2), "float32")}), "no LoRA weights"),
    "whole numbers": (save({"x.lora_A.weight": numpy.ones((2, 2), "int64")}), "of type I64"),
    "a rank too high": (save({"x.lora_A.weight": numpy.ones((1025, 1025), "float16")}), "has the rank 1025"),
    "a side too long": (save({"x.lora_A.weight": numpy.ones((1, 65_537), "float16")}), "has the shape"),
    "a name that is an expression": (
        save({"x.lora_A.weight": numpy.ones((2, 2), "float32"), "(?:[a-z]+)+!.alpha": numpy.ones(1, "float32")}),
        "is not a valid tensor name",
    ),
    "too many": (save({f"{n}.lora_A.weight": numpy.ones(1, "float16") for n in range(20_001)}), "holds 20001 tensors"),
    "an oversized header": (header(b" " * (8 * 2**20 + 1)), "larger than 8 MiB"),
    "too much metadata": (
        header({"__metadata__": {f"{n}": "" for n in range(4097)}, "a.lora_A.weight": ONE}, bytes(16)),
        "more than 4096 entries",
    ),
    "too large": (save({"x.lora_A.weight": numpy.ones((1024, 3100), "float32")}), "larger than 12582912 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_rejected(user: httpx.Client, running: Server, httpserver: HTTPServer, name: str) -> None:
    content, message = HOSTILE[name]
    httpserver.expect_request("/lora.safetensors").respond_with_data(content)
    assert_accepted(user, data_uri(GOOD))
    before = sorted((running.data_dir / "inputs").iterdir())
    assert message in rejection(user, httpserver.url_for("/lora.safetensors"))["msg"]
    assert sorted((running.data_dir / "inputs").iterdir()) == before


@pytest.mark.parametrize(
    "path",
    [*filter(None, FORBIDDEN), "http://0x7f.1/", "/etc/passwd", "../../etc/passwd", "owner/name/../../x", "./a/b"],
)
def test_forbidden_urls_are_rejected(constrained_client: httpx.Client, path: str) -> None:
    """Every URL that the guard rejects for webhooks is rejected here too, and so are paths on this machine."""
    assert rejection(constrained_client, path)["type"] == "file_download_error"


@pytest.mark.parametrize("scale", [-0.1, 4.1, "nan", None])
def test_invalid_scales_are_rejected(user: httpx.Client, scale: Any) -> None:
    response = user.post(LORA, json={"prompt": "", "loras": [{"path": data_uri(GOOD), "scale": scale}]})
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["body", "loras", 0, "scale"]


def test_the_number_of_loras_is_limited(user: httpx.Client, running: Server) -> None:
    """Send files that differ, because equal data URIs are one file."""
    before = len(stored(running))
    files = [save({"x.lora_A.weight": numpy.full((4, 8), n, "float16")}) for n in range(1000, 1001 + MAX_LORAS)]
    assert send(user, *map(data_uri, files)).json()["detail"][0]["loc"] == ["body", "loras"]
    assert len(stored(running)) == before
    assert_accepted(user, *map(data_uri, files[1:]))
    assert len(stored(running)) == before + MAX_LORAS


# -- how long files stay


def test_files_stay_until_their_space_is_needed(tmp_path: Path) -> None:
    clock = Clock()
    with open_components(tmp_path, clock=clock) as components:
        directory = components.data_dir / "inputs"
        names = [f"{number}{'0' * 63}.safetensors" for number in range(4)]
        for number, name in enumerate(names):
            (directory / name).write_bytes(bytes(1000))
            os.utime(directory / name, (clock.now + number, clock.now + number))
        components.queue.submit(submission(input_files={"loras.0.path": names[0]}))
        clock.now += 10_000
        components.inputs.cache.max_kept_bytes = 4000
        assert components.inputs.sweep() == 0
        components.inputs.cache.max_kept_bytes = 2500
        assert components.inputs.sweep() == 2
        assert sorted(path.name for path in directory.iterdir()) == [names[0], names[3]]
