"""Servers and clients that tests share."""

from collections.abc import Iterator

import httpx
import pytest

from tests.serving import Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with the demo weights and the test models, plain and TLS."""
    with serving(tmp_path_factory.mktemp("data"), tls_port=str(_free_port())) as running:
        yield running.ready()


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """A plain HTTP client of that server."""
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


def _free_port() -> int:
    """A port for TLS, where 0 stands for off."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
