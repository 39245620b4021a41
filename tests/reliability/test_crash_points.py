"""The server is killed at each named moment of a request's life; the next one does what was promised."""

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

from tests.support.components import opened
from tests.support.faults.points import POINTS
from tests.support.repeats import rounds
from tests.support.server_process import ROOT, completed, serving

MODELS = ROOT / "tests" / "support" / "faults" / "models"
QUEUED = "/queue/test/crash"
#: Two pictures of colours that the seed gives.
BODY: dict[str, Any] = {"prompt": "x", "seed": 70, "num_images": 2, "image_size": "square", "num_inference_steps": 4}


@dataclass(frozen=True)
class Asker:
    """A client that asks for one thing, as often as it must; the key says that it is the same."""

    key: str
    body: dict[str, Any]
    hook: str

    def ask(self, client: httpx.Client) -> dict[str, Any]:
        """Submit; raises TransportError when the server is gone."""
        parameters, headers = {"fal_webhook": self.hook}, {"idempotency-key": self.key}
        answer: dict[str, Any] = client.post(QUEUED, json=self.body, params=parameters, headers=headers).json()
        return answer

    def ask_once(self, url: str) -> str | None:
        """The request's id, if there was an answer: the process may be gone before it has left."""
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            with contextlib.suppress(httpx.TransportError):
                return str(self.ask(client)["request_id"])
            return None


def settings() -> dict[str, str]:
    return {"models_dir": str(MODELS), "outbound_allow": "127.0.0.0/8"}


def bodies(number: int) -> list[dict[str, Any]]:
    """One request in the first round; up to four at a time, of all kinds, in the others."""
    rng = random.Random(number)
    others = [
        {**BODY, "seed": 70 + place, "num_images": rng.randint(1, 3), "num_inference_steps": rng.randint(1, 6)}
        for place in range(1, number % 4 + 1 if number else 1)
    ]
    return [BODY, *others]


def digests(client: httpx.Client, result: dict[str, Any]) -> list[str]:
    """What the pictures' bytes are."""
    return [hashlib.sha256(client.get(httpx.URL(image["url"]).path).content).hexdigest() for image in result["images"]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, Any]], list[str]]]:
    """The pictures of a server that nobody kills."""
    known: dict[str, list[str]] = {}
    with (
        serving(tmp_path_factory.mktemp("undisturbed"), "test/crash=demo", **settings()) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):

        def painted(body: dict[str, Any]) -> list[str]:
            if (name := str(body)) not in known:
                known[name] = digests(client, client.post("/test/crash", json=body).json())
            return known[name]

        yield painted


def crashed(tmp_path: Path, name: str, askers: list[Asker]) -> list[str | None]:
    """One life, that ends at the point; the ids that were answered, and None for each client that was not."""
    with (
        serving(tmp_path / "data", "test/crash=demo", **settings()) as server,
        ThreadPoolExecutor(len(askers)) as clients,
    ):
        url = server.ready().url
        answered = list(clients.map(lambda asker: asker.ask_once(url), askers))
        assert server.process.wait(60) == -9
    assert (tmp_path / "marker").exists()
    if not POINTS[name].is_acknowledged:
        assert None in answered
    return answered


def recovered(tmp_path: Path, askers: list[Asker]) -> tuple[list[str], list[list[str]]]:
    """The next life: all clients ask again, as fal-client does without an answer. The ids, and the pictures."""
    ids, pictures = [], []
    with (
        serving(tmp_path / "data", "test/crash=demo", **settings()) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        for answer in [asker.ask(client) for asker in askers]:
            # The URLs name the first life's port.
            assert completed(client, httpx.URL(answer["status_url"]).path)["status"] == "COMPLETED"
            result = client.get(httpx.URL(answer["response_url"]).path)
            assert result.status_code == 200
            ids.append(answer["request_id"])
            pictures.append(digests(client, result.json()))
        assert server.stop() == 0
    return ids, pictures


@pytest.mark.parametrize("number", rounds(1, 20))
@pytest.mark.parametrize("name", POINTS)
def test_killed(
    tmp_path: Path,
    name: str,
    number: int,
    undisturbed: Callable[[dict[str, Any]], list[str]],
    httpserver: HTTPServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One result each, with the bytes that it would have had; no row without its file, no file without its row."""
    monkeypatch.setenv("CRASH_AT", name)
    monkeypatch.setenv("CRASH_MARKER", str(tmp_path / "marker"))
    httpserver.expect_request("/hook").respond_with_data("")
    hook = httpserver.url_for("/hook")
    askers = [Asker(f"once {place}", body, hook) for place, body in enumerate(bodies(number))]
    answered = crashed(tmp_path, name, askers)
    ids, pictures = recovered(tmp_path, askers)
    assert pictures == [undisturbed(asker.body) for asker in askers]
    # Whoever was answered had that very request.
    assert all(before in (None, after) for before, after in zip(answered, ids, strict=True))
    with opened(tmp_path / "data") as parts:
        assert sorted(parts.rows("SELECT request_id, status FROM jobs")) == sorted((name, 200) for name in ids)
        assert [(file,) for file in parts.on_disk()] == parts.rows("SELECT name FROM files ORDER BY name")
        assert len(parts.on_disk()) == sum(asker.body["num_images"] for asker in askers)
        assert parts.rows("PRAGMA integrity_check") == [("ok",)]
        # Due still, or delivered: at least once, and always the same request.
        deliveries = parts.rows("SELECT (delivered_at IS NOT NULL) + (due_at IS NOT NULL) FROM deliveries")
        assert deliveries == [(1,)] * len(askers)
    assert {request.json["request_id"] for request, _ in httpserver.log} <= set(ids)
