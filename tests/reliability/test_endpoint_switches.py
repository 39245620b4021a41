"""Many switches between endpoints in one server process: on one set of weights, and between all endpoints."""

import base64
import io
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

from tests.support.endpoint_requests import small_body, upload_inputs
from tests.support.fal_endpoints import FACTS
from tests.support.server_process import Server, serving
from tests.support.tiny_kinds import weights_of_every_endpoint

ENDPOINTS = ("fal-ai/flux/dev", "fal-ai/flux/dev/image-to-image", "fal-ai/flux-lora", "fal-ai/flux-lora/inpainting")
TURNS = 100


class Caller:
    """A client of one server that sends the same small request to an endpoint each time."""

    def __init__(self, server: Server, client: httpx.Client) -> None:
        self._server, self._client = server, client
        inputs = upload_inputs(client)
        self._bodies = {endpoint: {**small_body(endpoint, inputs), "sync_mode": True} for endpoint in FACTS}

    def pixels(self, endpoint: str) -> bytes:
        """Generate the endpoint's image and return its pixels."""
        response = self._client.post(f"/{endpoint}", json=self._bodies[endpoint])
        assert response.status_code == 200, response.text
        content = base64.b64decode(response.json()["images"][0]["url"].partition(",")[2])
        return Image.open(io.BytesIO(content)).tobytes()

    def num_loads(self) -> int:
        """Return how often the server has loaded the transformer."""
        return self._server.output.count("loading transformer")

    def memory(self) -> int:
        """Return the resident memory of the server and its children, in bytes."""
        process = psutil.Process(self._server.process.pid)
        return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("turns", [12, pytest.param(TURNS, marks=pytest.mark.thorough)])
def test_switches_between_endpoints(tmp_path: Path, turns: int) -> None:
    """The weights are loaded once, memory does not grow, and the images equal those of a new process."""
    memory_used: list[int] = []
    images: dict[str, set[bytes]] = {endpoint: set() for endpoint in ENDPOINTS}
    with serving(tmp_path / "switching") as server, client_of(server) as client:
        caller = Caller(server, client)
        for turn in range(turns):
            endpoint = ENDPOINTS[turn % len(ENDPOINTS)]
            images[endpoint].add(caller.pixels(endpoint))
            memory_used.append(caller.memory())
        # The demo's own, and Fill's.
        assert caller.num_loads() == 2
    with serving(tmp_path / "new") as server, client_of(server) as client:
        caller = Caller(server, client)
        # In the other order, so that each image follows other ones than it did above.
        expected = {endpoint: {caller.pixels(endpoint)} for endpoint in reversed(ENDPOINTS)}
    assert images == expected
    assert len(set.union(*expected.values())) == len(ENDPOINTS)
    # Measured: one megabyte more.
    some = max(4, turns // 10)
    assert max(memory_used[-some:]) < max(memory_used[some : 2 * some]) + 25_000_000


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_hundred_switches_between_all_endpoints(tmp_path: Path) -> None:
    """Each set of weights is loaded once, memory does not grow, and an endpoint gives the same image each time."""
    endpoints = [endpoint for endpoint in FACTS if not endpoint.endswith("/stream")]
    rounds: list[dict[str, bytes]] = []
    memory_used: list[int] = []
    with serving(tmp_path / "data", *weights_of_every_endpoint(tmp_path)) as server, client_of(server) as client:
        caller = Caller(server, client)
        while sum(len(images) for images in rounds) < TURNS:
            # The next round is in another order, so that each image follows another one.
            rounds.append({endpoint: caller.pixels(endpoint) for endpoint in endpoints})
            endpoints = [*endpoints[1::2], *endpoints[::2]]
            memory_used.append(caller.memory())
        # The demo's own, Fill's, and those of `flux-general`.
        assert caller.num_loads() == 3
    assert all(images == rounds[0] for images in rounds[1:])
    print(f"{len(endpoints)} endpoints, resident memory after each round: {memory_used}")
    assert memory_used[-1] < memory_used[-2] + 25_000_000


def client_of(server: Server) -> httpx.Client:
    """Wait until the server is ready; return a client of it."""
    return httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False)
