"""Tests of `kill -9` and SIGTERM: no request is lost or done twice, and images have the same bytes."""

import hashlib
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.components import open_components
from tests.support.repeats import round_params
from tests.support.server_process import (
    TEST_MODELS,
    Gate,
    Server,
    serving,
    statuses,
    wait_until_claimed,
    wait_until_completed,
)

SMALL = {"image_size": {"width": 256, "height": 256}, "num_inference_steps": 10}
REQUESTS: list[dict[str, Any]] = [
    {**SMALL, "prompt": "a tiger", "seed": 7},
    {**SMALL, "prompt": "a lion", "seed": 8, "output_format": "png"},
    {**SMALL, "prompt": "a cat", "seed": 9, "num_images": 2, "guidance_scale": 7},
]
NUM_CLIENTS = 8


def client_of(server: Server) -> httpx.Client:
    """Wait until the server is ready; return a client of the server."""
    return httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False)


def submit(client: httpx.Client, request: dict[str, Any], endpoint: str = "fal-ai/flux/dev") -> str:
    """Submit a request to the queue. Return its status path, which stays valid when the port changes."""
    status_url: str = client.post(f"/queue/{endpoint}", json=request).json()["status_url"]
    return urlsplit(status_url).path


def digests(client: httpx.Client, status_path: str) -> list[str]:
    """Wait until a request succeeds. Return the SHA-256 digests of its images."""
    assert wait_until_completed(client, status_path).get("error") is None
    result = client.get(status_path.removesuffix("/status")).json()
    paths = [urlsplit(image["url"]).path for image in result["images"]]
    return [hashlib.sha256(client.get(path).raise_for_status().content).hexdigest() for path in paths]


def rows(data_dir: Path, sql: str) -> list[tuple[Any, ...]]:
    """Query the database after its server has exited. Raises if another server holds it."""
    with open_components(data_dir) as components:
        assert components.rows("PRAGMA integrity_check") == [("ok",)]
        return components.rows(sql)


def request_ids(status_paths: list[str]) -> list[str]:
    """Return the request IDs, sorted."""
    return sorted(path.split("/")[-2] for path in status_paths)


def test_a_restarted_server_generates_the_same_bytes_after_a_kill(tmp_path: Path, client: httpx.Client) -> None:
    expected = [digests(client, submit(client, request)) for request in REQUESTS]
    with serving(tmp_path) as first, client_of(first) as before:
        paths = [submit(before, request) for request in REQUESTS]
        assert next(status for status in statuses(before, paths[0]) if status["logs"])["status"] == "IN_PROGRESS"
        first.kill()
    with serving(tmp_path) as second, client_of(second) as after:
        assert [digests(after, path) for path in paths] == expected
        assert second.stop() == 0
    jobs = rows(tmp_path, "SELECT request_id, status, attempt FROM jobs ORDER BY request_id")
    assert [row[:2] for row in jobs] == [(request_id, 200) for request_id in request_ids(paths)]
    assert max(attempt for _, _, attempt in jobs) == 2
    with open_components(tmp_path) as components:
        assert [(name,) for name in components.stored_file_names()] == components.rows(
            "SELECT name FROM files ORDER BY name"
        )
        assert len(components.stored_file_names()) == sum(len(images) for images in expected)


def submit_until_killed(url: str, acknowledged: list[str], enough: int, is_enough: threading.Event) -> None:
    """Submit requests until the server is gone; collect those acknowledged, and set `is_enough` at `enough` of them."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        while True:
            try:
                acknowledged.append(submit(client, {"prompt": "x", "seed": 7}, "test/null"))
            except httpx.TransportError:
                return
            if len(acknowledged) >= enough:
                is_enough.set()


@pytest.mark.parametrize("number", round_params(5, 100))
def test_acknowledged_requests_survive_a_kill_under_load(tmp_path: Path, number: int) -> None:
    acknowledged: list[str] = []
    enough = random.Random(number).randint(10, 70)
    is_enough = threading.Event()
    with serving(tmp_path, TEST_MODELS) as first, ThreadPoolExecutor(NUM_CLIENTS) as clients:
        url = first.ready().url
        submitters = [
            clients.submit(submit_until_killed, url, acknowledged, enough, is_enough) for _ in range(NUM_CLIENTS)
        ]
        assert is_enough.wait(60)
        first.kill()
    # Every client was cut off, and no submit was refused.
    assert [client.result() for client in submitters] == [None] * NUM_CLIENTS
    with serving(tmp_path, TEST_MODELS) as second, client_of(second) as client:
        assert {wait_until_completed(client, path)["status"] for path in acknowledged} == {"COMPLETED"}
        results = [client.get(path.removesuffix("/status")) for path in acknowledged]
        assert {result.status_code for result in results} == {200}
        assert second.stop() == 0
    job_rows = rows(tmp_path, "SELECT request_id FROM jobs")
    assert len(set(acknowledged)) == len(acknowledged)
    # Every acknowledged request must exist. Each client may add one whose answer was lost.
    assert set(request_ids(acknowledged)) <= {request_id for (request_id,) in job_rows}
    assert len(job_rows) - len(acknowledged) <= NUM_CLIENTS
    # Each successful request has one image, and there are no other files.
    files = rows(tmp_path, "SELECT name, request_id FROM files ORDER BY name")
    successful = rows(tmp_path, "SELECT request_id FROM jobs WHERE status = 200")
    assert sorted(request_id for _, request_id in files) == sorted(request_id for (request_id,) in successful)
    with open_components(tmp_path) as components:
        assert components.stored_file_names() == [name for name, _ in files]


def test_runs_and_streams_are_cancelled_after_a_kill(tmp_path: Path) -> None:
    gate, data_dir = tmp_path / "gate", tmp_path / "data"
    os.mkfifo(gate)
    request = {"prompt": str(gate), "num_inference_steps": 2}
    with serving(data_dir, TEST_MODELS) as first, client_of(first) as client, ThreadPoolExecutor(1) as threads:
        run = threads.submit(client.post, "/test/gate", json=request)
        # Opening returns when the worker opens the other end in the first step of the job.
        descriptor = os.open(gate, os.O_WRONLY)
        with client.stream("POST", "/test/gate/stream", json=request) as stream:
            stream_id = stream.headers["x-fal-request-id"]
            first.kill()
        assert isinstance(run.exception(), httpx.TransportError)
        os.close(descriptor)
    with serving(data_dir, TEST_MODELS) as second, client_of(second) as client:
        assert client.get(f"/queue/test/gate/requests/{stream_id}").status_code == 499
        assert second.stop() == 0
    jobs = rows(data_dir, "SELECT mode, state, status, error_type, attempt FROM jobs ORDER BY mode")
    assert [row[:4] for row in jobs] == [
        ("run", "COMPLETED", 499, "client_disconnected"),
        ("stream", "COMPLETED", 499, "client_disconnected"),
    ]
    assert jobs[0][4] == 1


def test_a_second_server_on_the_same_data_directory_does_not_start(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as first, client_of(first) as client:
        with serving(tmp_path, TEST_MODELS) as second:
            second.wait_for(rf"another server is using {tmp_path}; give this one its own --data-dir")
            assert second.process.wait(60) == 1
            assert "Traceback" not in second.output
        assert client.get("/health/ready").status_code == 200


def test_shutdown_requeues_unfinished_requests(tmp_path: Path, gate: Gate) -> None:
    data_dir = tmp_path / "data"
    request = {"prompt": str(gate.path), "seed": 7, "num_inference_steps": 50}
    with serving(data_dir, TEST_MODELS, shutdown_grace="0") as first, client_of(first) as client:
        path = submit(client, request, "test/gate")
        wait_until_claimed(client, path)
        first.process.terminate()
        first.wait_for("stopping")
        gate.release(1)
        assert first.process.wait(60) == 0
        assert "Traceback" not in first.output
    gate.release(50)
    with serving(data_dir, TEST_MODELS) as second, client_of(second) as client:
        assert wait_until_completed(client, path).get("error") is None
        assert second.stop() == 0
    assert rows(data_dir, "SELECT status, attempt FROM jobs") == [(200, 2)]


def test_an_idle_server_stops_cleanly(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as server, client_of(server) as client:
        assert client.get("/health").status_code == 200
        assert server.stop() == 0
        assert "Traceback" not in server.output


def test_shutdown_finishes_requests_within_the_grace_period(tmp_path: Path, gate: Gate) -> None:
    data_dir = tmp_path / "data"
    request = {"prompt": str(gate.path), "seed": 7, "num_inference_steps": 2}
    with serving(data_dir, TEST_MODELS, shutdown_grace="60") as server, client_of(server) as client:
        path = submit(client, request, "test/gate")
        wait_until_claimed(client, path)
        server.process.terminate()
        server.wait_for("stopping")
        gate.release(2)
        assert server.process.wait(60) == 0
    assert rows(data_dir, "SELECT status, attempt FROM jobs") == [(200, 1)]
