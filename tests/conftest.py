"""Fixtures shared by all tests: servers, clients and components."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support import forking
from tests.support.components import Components, open_components
from tests.support.node import JS
from tests.support.server_process import TEST_MODELS, Gate, Server, free_port, open_gate, serving, serving_with_proxy

forking.enable()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start one server with the demo weights and the test models, over plain HTTP and TLS."""
    with serving(tmp_path_factory.mktemp("data"), tls_port=str(free_port())) as running:
        yield running.ready()


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """Yield a plain HTTP client of `server`."""
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def server_still_works(client: httpx.Client) -> Iterator[None]:
    """Check after the test that `server` is still alive and still generates."""
    yield
    assert client.get("/health").status_code == 200
    assert client.post("/test/null", json={"prompt": "still there?"}).json()["prompt"] == "still there?"


@pytest.fixture(scope="session")
def constrained_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server with only the test models that runs one request at a time and accepts bodies of up to 1 MiB."""
    settings = {"max_running": "1", "max_body_mib": "1", "tls_port": str(free_port())}
    with serving(tmp_path_factory.mktemp("constrained"), TEST_MODELS, **settings) as running:
        yield running.ready()


@pytest.fixture
def constrained_client(constrained_server: Server) -> Iterator[httpx.Client]:
    """Yield a plain HTTP client of `constrained_server`."""
    with httpx.Client(base_url=constrained_server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def server_with_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server with only the test models; it requires the key of Alice or of Bob."""
    settings = {"keys": "alice:secret,bob:secret", "tls_port": str(free_port())}
    with serving(tmp_path_factory.mktemp("keyed"), TEST_MODELS, **settings) as running:
        yield running.ready()


@pytest.fixture
def keyless_client(server_with_keys: Server) -> Iterator[httpx.Client]:
    """Yield a client of `server_with_keys` that sends no key by default."""
    with httpx.Client(base_url=server_with_keys.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def proxy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server with the demo weights, the test models, TLS and the CONNECT proxy."""
    with serving_with_proxy(tmp_path_factory.mktemp("proxy")) as running:
        yield running


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Create a closed gate for test/gate; a request to test/gate has the path of its gate as the prompt."""
    with open_gate(tmp_path / "gate") as closed_gate:
        yield closed_gate


@pytest.fixture
def components(tmp_path: Path) -> Iterator[Components]:
    """Open database, queue and file store without a server."""
    with open_components(tmp_path / "data") as components:
        yield components


@pytest.fixture(scope="session")
def node() -> None:
    """Skip the test if Node or the SDKs are missing; in CI, fail instead."""
    requirements = {
        "node": shutil.which("node"),
        "tests/support/js/node_modules": (JS / "node_modules" / "@fal-ai").is_dir(),
    }
    missing = " and ".join(name for name, is_present in requirements.items() if not is_present)
    if missing and os.environ.get("CI"):
        pytest.fail(f"{missing} missing: CI must not skip the tests of the Node SDKs")
    if missing:
        pytest.skip(f"{missing} missing: install Node 20 and run `make test`, which installs the SDKs")
