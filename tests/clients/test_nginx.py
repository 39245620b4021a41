"""Tests behind a real nginx with docs/nginx.conf: fal-client calls, unbuffered streams, forged headers."""

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

from tests.support.nginx import NAME, SAMPLE, Nginx, run_nginx
from tests.support.server_process import ROOT, TEST_MODELS, Gate, Server, free_port, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server that generates a key, since it trusts a proxy and has no key configured."""
    with serving(tmp_path_factory.mktemp("behind"), TEST_MODELS, trusted_proxies="127.0.0.1") as running:
        yield running.ready()


@pytest.fixture(scope="module")
def key(server: Server) -> str:
    return server.wait_for(r"FAL_KEY=(\S+)")[1]


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Nginx]:
    with run_nginx(tmp_path_factory.mktemp("nginx") / "front", server) as running:
        yield running


@pytest.fixture
def remote_client(nginx: Nginx, key: str) -> Iterator[httpx.Client]:
    """Open an HTTP client that connects through nginx with a key, as a client on the internet does."""
    headers = {"authorization": f"Key {key}"}
    context = ssl.create_default_context(cafile=nginx.authority)
    with httpx.Client(base_url=nginx.url, verify=context, timeout=60, trust_env=False, headers=headers) as client:
        yield client


def start_fal_client(nginx: Nginx, key: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a fal-client program, configured only with nginx's host and a key; return the process."""
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
def results(nginx: Nginx, key: str) -> Any:
    with start_fal_client(nginx, key, "by_host", "test/null") as program:
        output, _ = program.communicate(timeout=60)
    return json.loads(output)


def test_every_call_of_fal_client(results: Any, nginx: Nginx, remote_client: httpx.Client) -> None:
    for call in ("run", "submit", "subscribe", "stream", "realtime"):
        assert results[call]["seed"] == 7, call
        url = results[call]["images"][0]["url"]
        # URLs point to nginx and serve an image.
        if call != "realtime":
            assert url.startswith(f"{nginx.url}/files/")
            assert remote_client.get(url).headers["content-type"] == "image/jpeg"
    assert results["error"] == 422


def test_stream_events_arrive_at_once(remote_client: httpx.Client, gate: Gate) -> None:
    """Read the first event before the second step may run. A buffer in nginx would hold the event back."""
    gate.release(1)
    body = {"prompt": str(gate.path), "num_inference_steps": 2}
    with remote_client.stream("POST", "/test/gate/stream", json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        assert json.loads(next(lines)[6:])["step"] == 1
        gate.release_all()
        *_, last = lines
    assert json.loads(last[6:])["images"]


def test_uploads_up_to_100_mib(nginx: Nginx, remote_client: httpx.Client) -> None:
    limit = 100 * 2**20
    answer = remote_client.post("/files/upload", content=bytes(limit), headers={"content-type": "image/png"})
    url = answer.raise_for_status().json()["access_url"]
    assert url.startswith(f"{nginx.url}/files/")
    assert remote_client.head(url).headers["content-length"] == str(limit)
    assert remote_client.post("/files/upload", content=bytes(limit + 1)).status_code == 413


def test_forged_forwarding_headers_are_ignored(nginx: Nginx, remote_client: httpx.Client) -> None:
    forged = {"x-forwarded-host": "evil.example", "x-forwarded-proto": "http", "x-forwarded-prefix": "/evil"}
    answer = remote_client.post("/queue/test/null", json={"prompt": "x"}, headers=forged).raise_for_status()
    assert answer.json()["status_url"].startswith(f"{nginx.url}/queue/test/null/requests/")
    # The Host header differs from the name in the TLS handshake.
    assert remote_client.get("/health", headers={"host": "evil.example"}).status_code == 421


def test_other_host_names_are_refused(nginx: Nginx) -> None:
    context = ssl.create_default_context(cafile=nginx.authority)
    with pytest.raises(httpx.ConnectError), httpx.Client(verify=context, trust_env=False) as client:
        client.get(f"https://127.0.0.1:{nginx.port}/health")
    with httpx.Client(trust_env=False) as client:
        answer = client.get(f"http://127.0.0.1:{nginx.plain_port}/health?x=1", headers={"host": "evil.example"})
    assert (answer.status_code, answer.headers["location"]) == (301, f"{nginx.url}/health?x=1")


def test_a_request_without_a_key_is_refused(remote_client: httpx.Client) -> None:
    assert remote_client.post("/test/null", json={"prompt": "x"}, headers={"authorization": ""}).status_code == 401


def test_a_server_without_trusted_proxies_refuses_every_request(tmp_path: Path) -> None:
    """Refuse every host, even without keys: the server would otherwise take nginx's remote clients for local ones."""
    with serving(tmp_path / "open", TEST_MODELS) as server, run_nginx(tmp_path / "front", server, NAME) as nginx:
        context = ssl.create_default_context(cafile=nginx.authority)
        with httpx.Client(verify=context, trust_env=False, timeout=60) as client:
            for host in (NAME, "localhost", "127.0.0.1"):
                extensions = {"sni_hostname": NAME}
                answer = client.get(f"{nginx.url}/health", headers={"host": host}, extensions=extensions)
                assert answer.status_code == 421, host


@pytest.mark.soak
def test_fal_client_waits_while_the_server_restarts(tmp_path: Path) -> None:
    """Check that fal-client retries when nginx itself answers with an error."""
    port = str(free_port())
    with serving(tmp_path / "data", TEST_MODELS, keys="alice:secret", port=port) as server:
        server.ready()
        with run_nginx(tmp_path / "front", server) as nginx:
            assert server.stop() == 0
            with start_fal_client(nginx, "alice:secret", "hello", "test/null") as program:
                while "Connection refused" not in nginx.errors:
                    assert program.poll() is None
                with serving(tmp_path / "data", TEST_MODELS, keys="alice:secret", port=port):
                    output, _ = program.communicate(timeout=60)
    assert json.loads(output)["prompt"] == "hello"


def test_the_docs_link_the_sample_configuration() -> None:
    for name in ("deploy.md", "operations.md"):
        assert f"({SAMPLE.name})" in (ROOT / "docs" / name).read_text(encoding="utf-8")
