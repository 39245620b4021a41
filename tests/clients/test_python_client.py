"""Tests of fal-client 1.0.3, sync and async, configured only with the variables that `flux-server env` prints."""

import json
import os
import shlex
import subprocess
import sys
from functools import cache
from typing import Any

import httpx
import pytest

from tests.support.server_process import ROOT, Gate, Server

sync_and_async = pytest.mark.parametrize("kind", ["", "_async"], ids=["sync", "async"])


@cache
def env_variables(server: Server) -> dict[str, str]:
    """Run `flux-server env` and return its variables, parsed as a shell parses them."""
    command = [sys.executable, "-m", "server", "env"]
    process = subprocess.run(command, cwd=ROOT, env=server.environment(), text=True, capture_output=True, check=True)
    tokens = shlex.split(process.stdout, comments=True)
    return dict(token.split("=", 1) for token in tokens if token != "export")


def run_client(server: Server, *arguments: str, **variables: str) -> Any:
    """Run a fal-client program with PATH, the variables of `flux-server env` and these variables; return its output."""
    environment = {"PATH": os.environ["PATH"], **env_variables(server), **variables}
    command = [sys.executable, "-m", "tests.support.fal_client_calls", *arguments]
    process = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=60)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def download_image(answer: dict[str, Any]) -> bytes:
    """Download the first image of an answer and return its bytes."""
    response = httpx.get(answer["images"][0]["url"], verify=False, trust_env=False)
    assert response.status_code == 200
    return response.content


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
