"""The server is killed at each named moment of a request's life; the next one does what was promised."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from pytest_httpserver import HTTPServer

from tests.faults.points import POINTS
from tests.parts import opened
from tests.serving import ROOT, completed, serving

MODELS = ROOT / "tests" / "faults" / "models"
QUEUED = "/queue/test/crash"
#: Two pictures of colours that the seed gives.
BODY = {"prompt": "x", "seed": 70, "num_images": 2, "image_size": "square", "num_inference_steps": 4}


def settings() -> dict[str, str]:
    return {"models_dir": str(MODELS), "outbound_allow": "127.0.0.0/8"}


def digests(client: httpx.Client, result: dict[str, Any]) -> list[str]:
    """What the pictures' bytes are."""
    return [hashlib.sha256(client.get(httpx.URL(image["url"]).path).content).hexdigest() for image in result["images"]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The pictures of a server that nobody kills."""
    with (
        serving(tmp_path_factory.mktemp("undisturbed"), "test/crash=demo", **settings()) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        return digests(client, client.post("/test/crash", json=BODY).json())


def crashed(tmp_path: Path, name: str, hook: str) -> None:
    """One life, that ends at the point; a client that was answered, or not."""
    with (
        serving(tmp_path / "data", "test/crash=demo", **settings()) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        ask = {"url": QUEUED, "json": BODY, "params": {"fal_webhook": hook}, "headers": {"idempotency-key": "once"}}
        if POINTS[name].is_acknowledged:
            # The process may be gone before the answer has left it, though the row is there.
            with contextlib.suppress(httpx.TransportError):
                client.post(**ask)  # type: ignore[arg-type]
        else:
            with pytest.raises(httpx.TransportError):
                client.post(**ask)  # type: ignore[arg-type]
        assert server.process.wait(60) == -9
    assert (tmp_path / "marker").exists()


def recovered(tmp_path: Path, hook: str) -> tuple[str, list[str]]:
    """The next life: the client that was not answered asks again, as fal-client does. The id, and the pictures."""
    with (
        serving(tmp_path / "data", "test/crash=demo", **settings()) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        answer = client.post(
            QUEUED, json=BODY, params={"fal_webhook": hook}, headers={"idempotency-key": "once"}
        ).json()
        # The URLs name the first life's port.
        assert completed(client, httpx.URL(answer["status_url"]).path)["status"] == "COMPLETED"
        result = client.get(httpx.URL(answer["response_url"]).path)
        assert result.status_code == 200
        pictures = digests(client, result.json())
        assert server.stop() == 0
    return answer["request_id"], pictures


@pytest.mark.parametrize("name", POINTS)
def test_killed(
    tmp_path: Path,
    name: str,
    undisturbed: list[str],
    httpserver: HTTPServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One result, with the bytes that it would have had; no row without its file, no file without its row."""
    monkeypatch.setenv("CRASH_AT", name)
    monkeypatch.setenv("CRASH_MARKER", str(tmp_path / "marker"))
    httpserver.expect_request("/hook").respond_with_data("")
    hook = httpserver.url_for("/hook")
    crashed(tmp_path, name, hook)
    request_id, pictures = recovered(tmp_path, hook)
    assert pictures == undisturbed
    with opened(tmp_path / "data") as parts:
        assert parts.rows("SELECT request_id, status FROM jobs") == [(request_id, 200)]
        assert [(file,) for file in parts.on_disk()] == parts.rows("SELECT name FROM files ORDER BY name")
        assert len(parts.on_disk()) == 2
        assert parts.rows("PRAGMA integrity_check") == [("ok",)]
        # Due still, or delivered: at least once, and always the same request.
        ((delivered, due),) = parts.rows("SELECT delivered_at IS NOT NULL, due_at IS NOT NULL FROM deliveries")
        assert delivered + due == 1
    assert {request.json["request_id"] for request, _ in httpserver.log} <= {request_id}
