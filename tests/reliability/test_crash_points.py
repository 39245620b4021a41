"""Tests that kill the server at each named point of a request. The next server completes every accepted request."""

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from pytest_httpserver import HTTPServer

from tests.support.components import open_components
from tests.support.faults.points import POINTS
from tests.support.repeats import round_params
from tests.support.server_process import ROOT, serving, wait_until_completed

MODELS = ROOT / "tests" / "support" / "faults" / "models"
QUEUE_PATH = "/queue/test/crash"
#: Generates two images whose colours depend on the seed.
BODY: dict[str, Any] = {"prompt": "x", "seed": 70, "num_images": 2, "image_size": "square", "num_inference_steps": 4}


@dataclass(frozen=True)
class RetryingClient:
    """A client that submits one request, as often as necessary, with the same idempotency key."""

    key: str
    body: dict[str, Any]
    webhook_url: str

    def submit(self, client: httpx.Client) -> dict[str, Any]:
        """Submit the request and return the answer. Raises TransportError if the server is gone."""
        parameters, headers = {"fal_webhook": self.webhook_url}, {"idempotency-key": self.key}
        answer: dict[str, Any] = client.post(QUEUE_PATH, json=self.body, params=parameters, headers=headers).json()
        return answer

    def submit_once(self, url: str) -> str | None:
        """Submit once and return the request ID, or None if the server dies before its answer arrives."""
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            with contextlib.suppress(httpx.TransportError):
                return str(self.submit(client)["request_id"])
            return None


def settings() -> dict[str, str]:
    return {"models_dir": str(MODELS), "outbound_allow": "127.0.0.0/8"}


def random_bodies(number: int) -> list[dict[str, Any]]:
    """Return the bodies of concurrent requests: a fixed one and, after round 0, up to three more with random fields."""
    rng = random.Random(number)
    more = [
        {**BODY, "seed": 70 + index, "num_images": rng.randint(1, 3), "num_inference_steps": rng.randint(1, 6)}
        for index in range(1, number % 4 + 1 if number else 1)
    ]
    return [BODY, *more]


def digests(client: httpx.Client, result: dict[str, Any]) -> list[str]:
    """Download the images of a result and return their SHA-256 digests."""
    return [hashlib.sha256(client.get(httpx.URL(image["url"]).path).content).hexdigest() for image in result["images"]]


@pytest.fixture(scope="module")
def expected_digests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, Any]], list[str]]]:
    """Return a function that computes the image digests of a request on a server that is not killed."""
    cache: dict[str, list[str]] = {}
    with (
        serving(tmp_path_factory.mktemp("undisturbed"), "test/crash=demo", **settings()) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):

        def digests_of(body: dict[str, Any]) -> list[str]:
            if (key := str(body)) not in cache:
                cache[key] = digests(client, client.post("/test/crash", json=body).json())
            return cache[key]

        yield digests_of


def run_until_crash(tmp_path: Path, name: str, clients: list[RetryingClient]) -> list[str | None]:
    """Run a server until it dies at the crash point. Return each client's request ID, or None without an answer."""
    with (
        serving(tmp_path / "data", "test/crash=demo", **settings()) as server,
        ThreadPoolExecutor(len(clients)) as threads,
    ):
        url = server.ready().url
        answered_ids = list(threads.map(lambda each: each.submit_once(url), clients))
        assert server.process.wait(60) == -9
    assert (tmp_path / "marker").exists()
    if not POINTS[name].is_acknowledged:
        assert None in answered_ids
    return answered_ids


def retry_after_restart(tmp_path: Path, clients: list[RetryingClient]) -> tuple[list[str], list[list[str]]]:
    """Start the server again and let all clients retry, as fal-client does. Return request IDs and image digests."""
    ids, image_digests = [], []
    with (
        serving(tmp_path / "data", "test/crash=demo", **settings()) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        for answer in [each.submit(client) for each in clients]:
            # The URLs may contain the port of the first server.
            assert wait_until_completed(client, httpx.URL(answer["status_url"]).path)["status"] == "COMPLETED"
            result = client.get(httpx.URL(answer["response_url"]).path)
            assert result.status_code == 200
            ids.append(answer["request_id"])
            image_digests.append(digests(client, result.json()))
        assert server.stop() == 0
    return ids, image_digests


@pytest.mark.parametrize("number", round_params(1, 20))
@pytest.mark.parametrize("name", POINTS)
def test_kill_at_every_point(
    tmp_path: Path,
    name: str,
    number: int,
    expected_digests: Callable[[dict[str, Any]], list[str]],
    httpserver: HTTPServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check that each request has one result with unchanged bytes, and that rows and files match."""
    monkeypatch.setenv("CRASH_AT", name)
    monkeypatch.setenv("CRASH_MARKER", str(tmp_path / "marker"))
    httpserver.expect_request("/hook").respond_with_data("")
    webhook_url = httpserver.url_for("/hook")
    bodies = random_bodies(number)
    clients = [RetryingClient(f"once {index}", body, webhook_url) for index, body in enumerate(bodies)]
    answered_ids = run_until_crash(tmp_path, name, clients)
    ids, image_digests = retry_after_restart(tmp_path, clients)
    assert image_digests == [expected_digests(client.body) for client in clients]
    # A retry after an answer returns the same request.
    assert all(before in (None, after) for before, after in zip(answered_ids, ids, strict=True))
    with open_components(tmp_path / "data") as components:
        assert sorted(components.rows("SELECT request_id, status FROM jobs")) == sorted((name, 200) for name in ids)
        assert [(file,) for file in components.stored_file_names()] == components.rows(
            "SELECT name FROM files ORDER BY name"
        )
        assert len(components.stored_file_names()) == sum(client.body["num_images"] for client in clients)
        assert components.rows("PRAGMA integrity_check") == [("ok",)]
        # Each webhook is either due or delivered, and names one of these requests.
        deliveries = components.rows("SELECT (delivered_at IS NOT NULL) + (due_at IS NOT NULL) FROM deliveries")
        assert deliveries == [(1,)] * len(clients)
    assert {request.json["request_id"] for request, _ in httpserver.log} <= set(ids)
