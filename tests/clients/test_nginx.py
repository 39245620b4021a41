"""Behind a real nginx, as docs/nginx.conf has it: fal's client in every way, streams at once, nothing forged."""

import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.nginx import NAME, SAMPLE, Nginx, proxied
from tests.support.server_process import ROOT, TEST_MODELS, Gate, Server, free_port, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It was given no key, so it made one: others come through the proxy."""
    with serving(tmp_path_factory.mktemp("behind"), TEST_MODELS, trusted_proxies="127.0.0.1") as running:
        yield running.ready()


@pytest.fixture(scope="module")
def key(server: Server) -> str:
    return server.wait_for(r"FAL_KEY=(\S+)")[1]


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Nginx]:
    with proxied(tmp_path_factory.mktemp("nginx") / "front", server) as running:
        yield running


@pytest.fixture
def visitor(nginx: Nginx, key: str) -> Iterator[httpx.Client]:
    """Somebody on the internet, with a key."""
    headers = {"authorization": f"Key {key}"}
    context = ssl.create_default_context(cafile=nginx.authority)
    with httpx.Client(base_url=nginx.url, verify=context, timeout=60, trust_env=False, headers=headers) as client:
        yield client


def calling(nginx: Nginx, key: str, *arguments: str) -> subprocess.Popen[str]:
    """A program that says nothing but where the server is."""
    host = nginx.url.removeprefix("https://")
    environment = {
        "PATH": os.environ["PATH"],
        "FAL_KEY": key,
        "FAL_RUN_HOST": host,
        "FAL_QUEUE_RUN_HOST": f"{host}/queue",
        "SSL_CERT_FILE": str(nginx.authority),
    }
    command = [sys.executable, "-m", "tests.support.fal_client_calls", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)


@pytest.fixture(scope="module")
def got(nginx: Nginx, key: str) -> Any:
    with calling(nginx, key, "by_host", "test/null") as program:
        said, _ = program.communicate(timeout=60)
    return json.loads(said)


def test_fals_client_in_every_way(got: Any, nginx: Nginx, visitor: httpx.Client) -> None:
    for way in ("run", "submit", "subscribe", "stream", "realtime"):
        assert got[way]["seed"] == 7, way
        url = got[way]["images"][0]["url"]
        # Addresses are those of nginx, and lead to a picture.
        if way != "realtime":
            assert url.startswith(f"{nginx.url}/files/")
            assert visitor.get(url).headers["content-type"] == "image/jpeg"
    assert got["error"] == 422


def test_streams_come_as_they_are_said(visitor: httpx.Client, gate: Gate) -> None:
    """The first event is here before the second step may be taken; a buffer would hold it back."""
    gate.let(1)
    body = {"prompt": str(gate.path), "num_inference_steps": 2}
    with visitor.stream("POST", "/test/gate/stream", json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        assert json.loads(next(lines)[6:])["step"] == 1
        gate.open()
        *_, last = lines
    assert json.loads(last[6:])["images"]


def test_uploads_up_to_the_size_at_which_parts_begin(nginx: Nginx, visitor: httpx.Client) -> None:
    largest = 100 * 2**20
    answer = visitor.post("/files/upload", content=bytes(largest), headers={"content-type": "image/png"})
    url = answer.raise_for_status().json()["access_url"]
    assert url.startswith(f"{nginx.url}/files/")
    assert visitor.head(url).headers["content-length"] == str(largest)
    assert visitor.post("/files/upload", content=bytes(largest + 1)).status_code == 413


def test_what_a_client_says_of_itself_is_not_believed(nginx: Nginx, visitor: httpx.Client) -> None:
    forged = {"x-forwarded-host": "evil.example", "x-forwarded-proto": "http", "x-forwarded-prefix": "/evil"}
    answer = visitor.post("/queue/test/null", json={"prompt": "x"}, headers=forged).raise_for_status()
    assert answer.json()["status_url"].startswith(f"{nginx.url}/queue/test/null/requests/")
    # Another name than in the handshake.
    assert visitor.get("/health", headers={"host": "evil.example"}).status_code == 421


def test_another_name_is_not_answered(nginx: Nginx) -> None:
    context = ssl.create_default_context(cafile=nginx.authority)
    with pytest.raises(httpx.ConnectError), httpx.Client(verify=context, trust_env=False) as client:
        client.get(f"https://127.0.0.1:{nginx.port}/health")
    with httpx.Client(trust_env=False) as client:
        answer = client.get(f"http://127.0.0.1:{nginx.plain_port}/health?x=1", headers={"host": "evil.example"})
    assert (answer.status_code, answer.headers["location"]) == (301, f"{nginx.url}/health?x=1")


def test_without_a_key_nobody_comes_in(visitor: httpx.Client) -> None:
    assert visitor.post("/test/null", json={"prompt": "x"}, headers={"authorization": ""}).status_code == 401


def test_a_server_that_does_not_know_of_the_proxy_lets_nobody_in(tmp_path: Path) -> None:
    """On loopback it asks for no key, and would take everybody for somebody at this machine."""
    with serving(tmp_path / "open", TEST_MODELS) as server, proxied(tmp_path / "front", server, NAME) as nginx:
        context = ssl.create_default_context(cafile=nginx.authority)
        with httpx.Client(verify=context, trust_env=False, timeout=60) as client:
            for host in (NAME, "localhost", "127.0.0.1"):
                extensions = {"sni_hostname": NAME}
                answer = client.get(f"{nginx.url}/health", headers={"host": host}, extensions=extensions)
                assert answer.status_code == 421, host


@pytest.mark.soak
def test_fals_client_waits_while_the_server_restarts(tmp_path: Path) -> None:
    """It tries again what nginx itself answers."""
    port = str(free_port())
    with serving(tmp_path / "data", TEST_MODELS, keys="alice:secret", port=port) as server:
        server.ready()
        with proxied(tmp_path / "front", server) as nginx:
            assert server.stop() == 0
            with calling(nginx, "alice:secret", "hello", "test/null") as program:
                while "Connection refused" not in nginx.errors:
                    assert program.poll() is None
                with serving(tmp_path / "data", TEST_MODELS, keys="alice:secret", port=port):
                    said, _ = program.communicate(timeout=60)
    assert json.loads(said)["prompt"] == "hello"


def test_the_documents_lead_to_the_sample() -> None:
    for name in ("deploy.md", "operations.md"):
        assert f"({SAMPLE.name})" in (ROOT / "docs" / name).read_text(encoding="utf-8")
