"""SIGTERM with everything open: what runs, what streams, what waits on the line. Nothing is lost, nobody hangs."""

import contextlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from server.jobs import State
from tests.parts import opened
from tests.serving import TEST_MODELS, Gate, completed, in_progress, serving

NUMBER = 20


def followed(url: str, path: str, is_open: threading.Barrier) -> list[dict[str, Any]]:
    """Every event of a status stream, to its end; a stream that is cut off raises."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client, client.stream("GET", path) as response:
        lines = response.iter_lines()
        events = [json.loads(next(line for line in lines if line.startswith("data: "))[6:])]
        is_open.wait(60)
        return [*events, *(json.loads(line[6:]) for line in lines if line.startswith("data: "))]


def run(url: str, gate: Gate) -> httpx.Response:
    """A client that waits on the line."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        return client.post("/test/gate", json={"prompt": str(gate.path)})


def all_of(clients: ThreadPoolExecutor, act: Callable[..., Any], *arguments: Any) -> list[Future[Any]]:
    return [clients.submit(act, *arguments) for _ in range(NUMBER)]


def test_a_stop_with_everything_open(tmp_path: Path, gate: Gate) -> None:
    data_dir = tmp_path / "data"
    is_open = threading.Barrier(NUMBER + 1)
    with (
        serving(data_dir, TEST_MODELS, max_running="1", shutdown_grace="1") as first,
        httpx.Client(base_url=first.ready().url, timeout=60, trust_env=False) as client,
        ThreadPoolExecutor(2 * NUMBER) as clients,
    ):
        body = {"prompt": str(gate.path), "num_inference_steps": 50}
        paths = [httpx.URL(client.post("/queue/test/gate", json=body).json()["status_url"]).path for _ in range(2)]
        in_progress(client, paths[0])
        streams = all_of(clients, followed, first.url, f"{paths[0]}/stream", is_open)
        runs = all_of(clients, run, first.url, gate)
        is_open.wait(60)
        # All of them have a row before the signal comes.
        while client.get("/status.json").json()["now"]["queue_length"] < NUMBER + 1:
            continue
        first.process.terminate()
        first.wait_for("stopping")
        # Unready at once, as long as it answers at all.
        with contextlib.suppress(httpx.TransportError):
            assert client.get("/health/ready").status_code == 503
        gate.let(1)
        assert first.process.wait(60) == 0
        for stream in streams:
            assert stream.result(60)[-1]["status"] in ("IN_PROGRESS", "IN_QUEUE")
        answers = [answer.result(60) for answer in runs]
        assert {answer.status_code for answer in answers} == {500}
        assert {answer.json()["detail"] for answer in answers} == {"The server is stopping."}
        assert "Traceback" not in first.output
    gate.let(100)
    with (
        serving(data_dir, TEST_MODELS) as second,
        httpx.Client(base_url=second.ready().url, timeout=60, trust_env=False) as client,
    ):
        for path in paths:
            assert completed(client, path).get("error") is None
    with opened(data_dir) as parts:
        found = parts.rows("SELECT mode, state, status, count(*) FROM jobs GROUP BY 1, 2, 3 ORDER BY 1")
    assert found == [("queue", State.COMPLETED, 200, 2), ("run", State.COMPLETED, 499, NUMBER)]
