"""Endpoints, request ids and keys that are unknown, belong to another caller, or are in the wrong state."""

from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.support.error_bodies import error_message
from tests.support.server_process import Gate, Server, wait_until_claimed, wait_until_completed

FLUX = "/fal-ai/flux/dev"
ALICE, BOB = {"authorization": "Key alice:secret"}, {"authorization": "Key bob:secret"}


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize("prefix", ["", "/queue"])
@pytest.mark.parametrize(
    "path", ["/fal-ai/unknown", "/fal-ai/flux", "/x", "/", "/../..", "/%00", "/fal-ai/flux/schnel"]
)
def test_unknown_endpoint(client: httpx.Client, prefix: str, path: str) -> None:
    error_message(client.post(f"{prefix}{path}", json={"prompt": "x"}), 404)


def test_unknown_endpoint_lists_the_known_ones(client: httpx.Client) -> None:
    detail = error_message(client.post("/fal-ai/unknown", json={"prompt": "x"}), 404)
    assert "fal-ai/unknown" in detail
    assert "fal-ai/flux/dev" in detail


def test_unknown_path_of_an_endpoint(client: httpx.Client) -> None:
    assert error_message(client.post(f"{FLUX}/sub", json={"prompt": "x"}), 404) == "Path /sub not found"


CONTROLS = ["%00", "%09", "%0a", "%0D", "%1b", "%7f", "%c2%85"]
PATHS = ["/", "/health", "/status.json", "/metrics", "/docs", "/openapi.json", "/v1/models", "/static/app.js"]


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_character_in_a_path(client: httpx.Client, control: str) -> None:
    """Refuse a control character anywhere in a path, above all at the end, where a line feed is easily overlooked."""
    for path in PATHS:
        assert client.get(path).status_code == 200
        for bad_path in (f"{path}{control}", f"/{control}{path.removeprefix('/')}"):
            answer = client.get(bad_path)
            is_openai = bad_path.startswith("/v1")
            message = answer.json()["error"]["message"] if is_openai else error_message(answer, 404)
            assert "control character" in message
    status_url = client.post("/queue/test/null", json={"prompt": "x"}).json()["status_url"]
    assert "control character" in error_message(client.get(f"{status_url}{control}"), 404)
    for path in ("/test/null", "/queue/test/null", "/test/null/stream", "/files/upload", "/storage/upload/initiate"):
        assert "control character" in error_message(client.post(f"{path}{control}", json={"prompt": "x"}), 404)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_character_in_the_path_of_a_websocket(server: Server, control: str) -> None:
    url = server.url.replace("http", "ws")
    with connect(f"{url}/test/null/realtime"):
        pass
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{url}/test/null/realtime{control}")
    assert refused.value.response.status_code == 404


UNKNOWN_IDS = ["00000000-0000-4000-8000-000000000000", "x", "'", "%2e%2e", "%F0%9F%8D%8E", "x" * 4000]


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize("request_id", UNKNOWN_IDS)
@pytest.mark.parametrize("app", ["fal-ai/flux", "fal-ai/flux/dev", "nobody/nothing"])
def test_unknown_id(client: httpx.Client, app: str, request_id: str) -> None:
    url = f"/queue/{app}/requests/{request_id}"
    for path in (f"{url}/status", f"{url}/status/stream", f"{url}/response"):
        error_message(client.get(path), 404)
    answer = client.put(f"{url}/cancel")
    assert error_message(answer, 404)
    assert answer.json()["status"] == "NOT_FOUND"


def test_id_under_another_app(client: httpx.Client) -> None:
    request_id = client.post("/queue/test/null", json={"prompt": "x"}).json()["request_id"]
    for path in ("", "/status", "/status/stream", "/response"):
        error_message(client.get(f"/queue/fal-ai/flux/requests/{request_id}{path}"), 404)


def test_id_of_another_key(keyless_client: httpx.Client) -> None:
    reply = keyless_client.post("/queue/test/null", json={"prompt": "x"}, headers=ALICE).json()
    for path in ("", "/status", "/status/stream", "/response"):
        error_message(keyless_client.get(f"{reply['response_url']}{path}", headers=BOB), 404)
    assert keyless_client.put(reply["cancel_url"], headers=BOB).json()["status"] == "NOT_FOUND"
    assert keyless_client.get(reply["status_url"], headers=ALICE).json()["request_id"] == reply["request_id"]


def test_idempotency_key_of_another_key(keyless_client: httpx.Client) -> None:
    replies = [
        keyless_client.post("/queue/test/null", json={"prompt": "x"}, headers={**key, "idempotency-key": "1"}).json()
        for key in (ALICE, BOB, ALICE)
    ]
    assert replies[0]["request_id"] == replies[2]["request_id"] != replies[1]["request_id"]


BAD_KEYS = ["", "Key", "Key mallory:secret", "Bearer mallory:secret", "alice:secret", "Basic alice:secret"]


@pytest.mark.parametrize(
    "authorization", [None, *BAD_KEYS, "Key alice:secret:", "Key ALICE:SECRET", "Key \u00e9".encode()]
)
def test_bad_key(keyless_client: httpx.Client, authorization: Any) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    for path in ("/test/null", "/queue/test/null", "/test/null/stream"):
        assert error_message(keyless_client.post(path, json={"prompt": "x"}, headers=headers), 401)
    error_message(keyless_client.get("/queue/test/null/requests/x/status", headers=headers), 401)
    error_message(keyless_client.put("/queue/test/null/requests/x/cancel", headers=headers), 401)


@pytest.mark.parametrize("scheme", ["Key", "key", "Bearer", "Key  "])
def test_good_key(keyless_client: httpx.Client, scheme: str) -> None:
    headers = {"authorization": f"{scheme} alice:secret"}
    assert keyless_client.post("/test/null", json={"prompt": "x"}, headers=headers).status_code == 200


def test_a_bad_key_is_reported_before_a_bad_field(keyless_client: httpx.Client) -> None:
    error_message(keyless_client.post("/test/null", json={}), 401)
    error_message(keyless_client.post("/fal-ai/unknown", json={}), 401)


def test_result_too_early(constrained_client: httpx.Client, gate: Gate) -> None:
    running = constrained_client.post(
        "/queue/test/gate", json={"prompt": str(gate.path), "num_inference_steps": 1}
    ).json()
    waiting = constrained_client.post("/queue/test/null", json={"prompt": "x"}).json()
    wait_until_claimed(constrained_client, running["status_url"])
    for reply in (running, waiting):
        for url in (reply["response_url"], f"{reply['response_url']}/response"):
            assert error_message(constrained_client.get(url), 400) == "Request is still in progress"
    gate.release(1)
    for reply in (running, waiting):
        wait_until_completed(constrained_client, reply["status_url"])
        assert constrained_client.get(reply["response_url"]).status_code == 200


def test_cancel_twice(constrained_client: httpx.Client, gate: Gate) -> None:
    running = constrained_client.post("/queue/test/gate", json={"prompt": str(gate.path)}).json()
    waiting = constrained_client.post("/queue/test/null", json={"prompt": "x"}).json()
    wait_until_claimed(constrained_client, running["status_url"])
    assert constrained_client.put(waiting["cancel_url"]).json() == {"status": "OK"}
    for _ in range(2):
        answer = constrained_client.put(running["cancel_url"], json={})
        assert (answer.status_code, answer.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    gate.release(1)
    wait_until_completed(constrained_client, running["status_url"])
    for reply in (running, waiting):
        answer = constrained_client.put(reply["cancel_url"])
        assert "already completed" in error_message(answer, 400)
        assert answer.json()["status"] == "ALREADY_COMPLETED"
        assert "cancelled" in error_message(constrained_client.get(reply["response_url"]), 499)
