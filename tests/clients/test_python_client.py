"""fal-client 1.0.3, sync and async, led here by the variables that `flux-server env` prints and nothing else."""

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

BOTH = pytest.mark.parametrize("kind", ["", "_async"], ids=["sync", "async"])


@cache
def exports(server: Server) -> dict[str, str]:
    """The variables of `flux-server env`, read as a shell would."""
    command = [sys.executable, "-m", "server", "env"]
    printed = subprocess.run(command, cwd=ROOT, env=server.environment(), text=True, capture_output=True, check=True)
    words = shlex.split(printed.stdout, comments=True)
    return dict(word.split("=", 1) for word in words if word != "export")


def call(server: Server, *arguments: str, **other: str) -> Any:
    """What a program gets that runs with these variables alone."""
    environment = {"PATH": os.environ["PATH"], **exports(server), **other}
    command = [sys.executable, "-m", "tests.support.fal_client_calls", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def picture(answer: dict[str, Any]) -> bytes:
    """The bytes behind an answer's first URL."""
    response = httpx.get(answer["images"][0]["url"], verify=False, trust_env=False)
    assert response.status_code == 200
    return response.content


def test_the_variables_printed(server: Server) -> None:
    printed = exports(server)
    assert set(printed) == {"FAL_KEY", "FAL_RUN_HOST", "FAL_QUEUE_RUN_HOST", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"}
    assert printed["FAL_RUN_HOST"] == server.tls_host
    assert printed["FAL_QUEUE_RUN_HOST"] == f"{server.tls_host}/queue"


@pytest.fixture(scope="module", params=["everyday", "everyday_async"])
def got(server: Server, request: pytest.FixtureRequest) -> Any:
    """What a program gets that tries every way, sync and async."""
    return call(server, request.param)


def test_every_way_gives_the_same_picture(server: Server, got: Any) -> None:
    answers = [got["run"], got["submit"], got["subscribe"], got["stream"][-1], got["result"]]
    assert len({picture(answer) for answer in answers}) == 1
    for answer in answers:
        assert (answer["seed"], answer["prompt"], answer["has_nsfw_concepts"]) == (7, "a red apple", [False])
        assert answer["images"][0]["url"].startswith(f"https://{server.tls_host}/files/")
        assert answer["timings"]["inference"] > 0
    assert got["submit"] == got["result"]


def test_everyday_events(got: Any) -> None:
    for events in (got["events"], got["updates"]):
        assert {event["type"] for event in events} <= {"Queued", "InProgress", "Completed"}
        assert [line["message"] for line in events[-1]["logs"]] == [f"step {step}/4" for step in (1, 2, 3, 4)]
        assert events[-1]["metrics"]["inference_time"] > 0
        assert events[-1]["error"] is None
    assert got["status"] == got["events"][-1]
    assert len(got["enqueued"]) == 1
    *progress, _ = got["stream"]
    steps = [event["step"] for event in progress]
    assert steps == sorted(set(steps))
    assert all(event["type"] == "progress" and event["num_inference_steps"] == 4 for event in progress)


def test_logs_while_in_progress(narrow: Server, gate: Gate) -> None:
    seen = call(narrow, "watch", str(gate.path))
    types = [event["type"] for event in seen]
    assert types == sorted(types, key=["Queued", "InProgress", "Completed"].index)
    first = seen[types.index("InProgress")]
    assert first["logs"] == []
    assert [line["message"] for line in seen[-1]["logs"]] == ["step 1/2", "step 2/2"]


@BOTH
def test_cancel(narrow: Server, gate: Gate, kind: str) -> None:
    got = call(narrow, f"cancel{kind}", str(gate.path))
    assert got["places"] == [{"type": "Queued", "position": 0}, {"type": "InProgress", "logs": None}]
    for name in ("running", "waiting"):
        assert got[name]["error"]["status_code"] == 499
        assert got[name]["error"]["error_type"] == "client_cancelled"
        assert got[name]["error"]["message"] == "Request cancelled by the client."
        assert got[name]["status"]["type"] == "Completed"
        assert got[name]["status"]["error_type"] == "client_cancelled"
    assert got["again"]["status_code"] == 400
    assert "already completed" in got["again"]["message"]


@BOTH
def test_bad_fields(server: Server, kind: str) -> None:
    for error in call(server, f"bad{kind}", "fal-ai/flux/dev"):
        assert error["status_code"] == 422
        fields = {entry["loc"][-1]: entry for entry in error["message"]}
        assert fields["prompt"]["type"] == "string_type"
        assert fields["num_images"]["ctx"] == {"le": 4}


def test_start_timeout(narrow: Server, gate: Gate) -> None:
    got = call(narrow, "late", str(gate.path))
    for error in got["failures"]:
        assert error["status_code"] == 504
        assert error["error_type"] == "request_timeout"
        assert error["headers"]["x-fal-request-timeout-type"] == "user"
    assert got["status"]["type"] == "Completed"
    assert got["status"]["error_type"] == "request_timeout"
    assert got["holder"]["images"]


def test_key(keyed: Server) -> None:
    assert exports(keyed)["FAL_KEY"] == "alice:secret"
    assert call(keyed, "hello", "test/null")["prompt"] == "hello"
    assert call(keyed, "hello", "test/null", FAL_KEY="bob:secret")["prompt"] == "hello"
    error = call(keyed, "hello", "test/null", FAL_KEY="mallory:secret")
    assert error["status_code"] == 401
    assert isinstance(error["message"], str)


def test_unknown_endpoint(narrow: Server) -> None:
    error = call(narrow, "hello", "fal-ai/unknown")
    assert error["status_code"] == 404
    assert "fal-ai/unknown" in error["message"]
