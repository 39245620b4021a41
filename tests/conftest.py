"""Servers and clients that tests share."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.components import Parts, opened
from tests.support.server_process import TEST_MODELS, Gate, Server, free_port, gated, serving, with_door


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with the demo weights and the test models, plain and TLS."""
    with serving(tmp_path_factory.mktemp("data"), tls_port=str(free_port())) as running:
        yield running.ready()


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """A plain HTTP client of that server."""
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def serves_on(client: httpx.Client) -> Iterator[None]:
    """After whatever a test did, the same server is alive and paints."""
    yield
    assert client.get("/health").status_code == 200
    assert client.post("/test/null", json={"prompt": "still there?"}).json()["prompt"] == "still there?"


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The test models alone, one request at a time, bodies up to 1 MiB."""
    settings = {"max_running": "1", "max_body_mib": "1", "tls_port": str(free_port())}
    with serving(tmp_path_factory.mktemp("narrow"), TEST_MODELS, **settings) as running:
        yield running.ready()


@pytest.fixture
def narrow_client(narrow: Server) -> Iterator[httpx.Client]:
    """A plain HTTP client of that server."""
    with httpx.Client(base_url=narrow.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The test models alone, for those who have the key of Alice or of Bob."""
    settings = {"keys": "alice:secret,bob:secret", "tls_port": str(free_port())}
    with serving(tmp_path_factory.mktemp("keyed"), TEST_MODELS, **settings) as running:
        yield running.ready()


@pytest.fixture
def keyed_client(keyed: Server) -> Iterator[httpx.Client]:
    """A client of that server that sends no key by itself."""
    with httpx.Client(base_url=keyed.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the demo weights and the test models that clients reach through its CONNECT door."""
    with with_door(tmp_path_factory.mktemp("door")) as running:
        yield running


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A closed gate for test/gate, whose prompt is its path."""
    with gated(tmp_path / "gate") as closed:
        yield closed


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    """Database, queue and file store without a server around them."""
    with opened(tmp_path / "data") as parts:
        yield parts
