"""Tests of fal-client 1.0.3, sync and async, configured only with the variables that `flux-server env` prints."""

from typing import Any

import pytest

from tests.support.python_client import download_image, env_variables, run_client
from tests.support.server_process import Gate, Server

sync_and_async = pytest.mark.parametrize("kind", ["", "_async"], ids=["sync", "async"])


def test_the_variables_printed(server: Server) -> None:
    printed = env_variables(server)
    assert set(printed) == {"FAL_KEY", "FAL_RUN_HOST", "FAL_QUEUE_RUN_HOST", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"}
    assert printed["FAL_RUN_HOST"] == server.tls_host
    assert printed["FAL_QUEUE_RUN_HOST"] == f"{server.tls_host}/queue"


@pytest.fixture(scope="module", params=["everyday", "everyday_async"])
def results(server: Server, request: pytest.FixtureRequest) -> Any:
    """Run a program that makes every call, sync or async, and return its output."""
    return run_client(server, request.param)


def test_every_call_gives_the_same_image(server: Server, results: Any) -> None:
    answers = [results["run"], results["submit"], results["subscribe"], results["stream"][-1], results["result"]]
    assert len({download_image(answer) for answer in answers}) == 1
    for answer in answers:
        assert (answer["seed"], answer["prompt"], answer["has_nsfw_concepts"]) == (7, "a red apple", [False])
        assert answer["images"][0]["url"].startswith(f"https://{server.tls_host}/files/")
        assert answer["timings"]["inference"] > 0
    assert results["submit"] == results["result"]


def test_events_of_every_call(results: Any) -> None:
    for events in (results["events"], results["updates"]):
        assert {event["type"] for event in events} <= {"Queued", "InProgress", "Completed"}
        assert [line["message"] for line in events[-1]["logs"]] == [f"step {step}/4" for step in (1, 2, 3, 4)]
        assert events[-1]["metrics"]["inference_time"] > 0
        assert events[-1]["error"] is None
    assert results["status"] == results["events"][-1]
    assert len(results["enqueued"]) == 1
    *progress, _ = results["stream"]
    steps = [event["step"] for event in progress]
    assert steps == sorted(set(steps))
    assert all(event["type"] == "progress" and event["num_inference_steps"] == 4 for event in progress)


def test_logs_while_in_progress(constrained_server: Server, gate: Gate) -> None:
    events = run_client(constrained_server, "watch", str(gate.path))
    types = [event["type"] for event in events]
    assert types == sorted(types, key=["Queued", "InProgress", "Completed"].index)
    first = events[types.index("InProgress")]
    assert first["logs"] == []
    assert [line["message"] for line in events[-1]["logs"]] == ["step 1/2", "step 2/2"]


@sync_and_async
def test_cancel(constrained_server: Server, gate: Gate, kind: str) -> None:
    results = run_client(constrained_server, f"cancel{kind}", str(gate.path))
    assert results["places"] == [{"type": "Queued", "position": 0}, {"type": "InProgress", "logs": None}]
    for name in ("running", "waiting"):
        assert results[name]["error"]["status_code"] == 499
        assert results[name]["error"]["error_type"] == "client_cancelled"
        assert results[name]["error"]["message"] == "Request cancelled by the client."
        assert results[name]["status"]["type"] == "Completed"
        assert results[name]["status"]["error_type"] == "client_cancelled"
    assert results["again"]["status_code"] == 400
    assert "already completed" in results["again"]["message"]


@sync_and_async
def test_bad_fields(server: Server, kind: str) -> None:
    for error in run_client(server, f"bad{kind}", "fal-ai/flux/dev"):
        assert error["status_code"] == 422
        fields = {entry["loc"][-1]: entry for entry in error["message"]}
        assert fields["prompt"]["type"] == "string_type"
        assert fields["num_images"]["ctx"] == {"le": 4}


def test_start_timeout(constrained_server: Server, gate: Gate) -> None:
    results = run_client(constrained_server, "late", str(gate.path))
    for error in results["failures"]:
        assert error["status_code"] == 504
        assert error["error_type"] == "request_timeout"
        assert error["headers"]["x-fal-request-timeout-type"] == "user"
    assert results["status"]["type"] == "Completed"
    assert results["status"]["error_type"] == "request_timeout"
    assert results["holder"]["images"]


def test_keys(server_with_keys: Server) -> None:
    assert env_variables(server_with_keys)["FAL_KEY"] == "alice:secret"
    assert run_client(server_with_keys, "hello", "test/null")["prompt"] == "hello"
    assert run_client(server_with_keys, "hello", "test/null", FAL_KEY="bob:secret")["prompt"] == "hello"
    error = run_client(server_with_keys, "hello", "test/null", FAL_KEY="mallory:secret")
    assert error["status_code"] == 401
    assert isinstance(error["message"], str)


def test_unknown_endpoint(constrained_server: Server) -> None:
    error = run_client(constrained_server, "hello", "fal-ai/unknown")
    assert error["status_code"] == 404
    assert "fal-ai/unknown" in error["message"]
