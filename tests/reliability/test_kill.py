"""What `kill -9` and SIGTERM leave behind: nothing lost, nothing twice, the same bytes."""

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

from tests.support.components import opened
from tests.support.repeats import rounds
from tests.support.server_process import TEST_MODELS, Gate, Server, completed, in_progress, serving, statuses

SMALL = {"image_size": {"width": 256, "height": 256}, "num_inference_steps": 10}
REQUESTS: list[dict[str, Any]] = [
    {**SMALL, "prompt": "a tiger", "seed": 7},
    {**SMALL, "prompt": "a lion", "seed": 8, "output_format": "png"},
    {**SMALL, "prompt": "a cat", "seed": 9, "num_images": 2, "guidance_scale": 7},
]
SUBMITTERS = 8


def client_of(server: Server) -> httpx.Client:
    """A client of a server that can paint."""
    return httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False)


def submit(client: httpx.Client, request: dict[str, Any], endpoint: str = "fal-ai/flux/dev") -> str:
    """Put a request in the queue; returns the path of its status, which outlives the port."""
    status_url: str = client.post(f"/queue/{endpoint}", json=request).json()["status_url"]
    return urlsplit(status_url).path


def digests(client: httpx.Client, status_path: str) -> list[str]:
    """Wait for a request to end well; returns what its downloaded pictures add up to."""
    assert completed(client, status_path).get("error") is None
    result = client.get(status_path.removesuffix("/status")).json()
    paths = [urlsplit(image["url"]).path for image in result["images"]]
    return [hashlib.sha256(client.get(path).raise_for_status().content).hexdigest() for path in paths]


def rows(data_dir: Path, sql: str) -> list[tuple[Any, ...]]:
    """What the database says once its server is gone; raises when another has it."""
    with opened(data_dir) as parts:
        assert parts.rows("PRAGMA integrity_check") == [("ok",)]
        return parts.rows(sql)


def ids(status_paths: list[str]) -> list[str]:
    """The requests' own names, in a fixed order."""
    return sorted(path.split("/")[-2] for path in status_paths)


def test_a_killed_server_paints_the_same_bytes_when_it_is_back(tmp_path: Path, client: httpx.Client) -> None:
    undisturbed = [digests(client, submit(client, request)) for request in REQUESTS]
    with serving(tmp_path) as first, client_of(first) as before:
        paths = [submit(before, request) for request in REQUESTS]
        assert next(status for status in statuses(before, paths[0]) if status["logs"])["status"] == "IN_PROGRESS"
        first.kill()
    with serving(tmp_path) as second, client_of(second) as after:
        assert [digests(after, path) for path in paths] == undisturbed
        assert second.stop() == 0
    found = rows(tmp_path, "SELECT request_id, status, attempt FROM jobs ORDER BY request_id")
    assert [row[:2] for row in found] == [(request_id, 200) for request_id in ids(paths)]
    assert max(attempt for _, _, attempt in found) == 2
    with opened(tmp_path) as parts:
        assert [(name,) for name in parts.on_disk()] == parts.rows("SELECT name FROM files ORDER BY name")
        assert len(parts.on_disk()) == sum(len(pictures) for pictures in undisturbed)


def submit_until_killed(url: str, acknowledged: list[str], enough: int, is_enough: threading.Event) -> None:
    """One of many clients: submit without end, and remember what was answered."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        while True:
            try:
                acknowledged.append(submit(client, {"prompt": "x", "seed": 7}, "test/null"))
            except httpx.TransportError:
                return
            if len(acknowledged) >= enough:
                is_enough.set()


@pytest.mark.parametrize("number", rounds(5, 100))
def test_what_was_acknowledged_survives_a_kill_under_load(tmp_path: Path, number: int) -> None:
    acknowledged: list[str] = []
    enough = random.Random(number).randint(10, 70)
    is_enough = threading.Event()
    with serving(tmp_path, TEST_MODELS) as first, ThreadPoolExecutor(SUBMITTERS) as clients:
        url = first.ready().url
        submitting = [
            clients.submit(submit_until_killed, url, acknowledged, enough, is_enough) for _ in range(SUBMITTERS)
        ]
        assert is_enough.wait(60)
        first.kill()
    # Each was cut off, and nobody refused.
    assert [client.result() for client in submitting] == [None] * SUBMITTERS
    with serving(tmp_path, TEST_MODELS) as second, client_of(second) as client:
        assert {completed(client, path)["status"] for path in acknowledged} == {"COMPLETED"}
        results = [client.get(path.removesuffix("/status")) for path in acknowledged]
        assert {result.status_code for result in results} == {200}
        assert second.stop() == 0
    found = rows(tmp_path, "SELECT request_id FROM jobs")
    assert len(set(acknowledged)) == len(acknowledged)
    # A submit whose answer was lost may be there too, as one more; what was answered must be.
    assert set(ids(acknowledged)) <= {request_id for (request_id,) in found}
    assert len(found) - len(acknowledged) <= SUBMITTERS
    # One picture of each that is done, and no other.
    files = rows(tmp_path, "SELECT name, request_id FROM files ORDER BY name")
    done = rows(tmp_path, "SELECT request_id FROM jobs WHERE status = 200")
    assert sorted(request_id for _, request_id in files) == sorted(request_id for (request_id,) in done)
    with opened(tmp_path) as parts:
        assert parts.on_disk() == [name for name, _ in files]


def test_those_who_waited_on_the_line_are_not_painted_for_after_a_kill(tmp_path: Path) -> None:
    gate, data_dir = tmp_path / "gate", tmp_path / "data"
    os.mkfifo(gate)
    request = {"prompt": str(gate), "num_inference_steps": 2}
    with serving(data_dir, TEST_MODELS) as first, client_of(first) as client, ThreadPoolExecutor(1) as threads:
        run = threads.submit(client.post, "/test/gate", json=request)
        # Returns when the worker, in the job's first step, opens the other end.
        descriptor = os.open(gate, os.O_WRONLY)
        with client.stream("POST", "/test/gate/stream", json=request) as stream:
            streamed = stream.headers["x-fal-request-id"]
            first.kill()
        assert isinstance(run.exception(), httpx.TransportError)
        os.close(descriptor)
    with serving(data_dir, TEST_MODELS) as second, client_of(second) as client:
        assert client.get(f"/queue/test/gate/requests/{streamed}").status_code == 499
        assert second.stop() == 0
    found = rows(data_dir, "SELECT mode, state, status, error_type, attempt FROM jobs ORDER BY mode")
    assert [row[:4] for row in found] == [
        ("run", "COMPLETED", 499, "client_disconnected"),
        ("stream", "COMPLETED", 499, "client_disconnected"),
    ]
    assert found[0][4] == 1


def test_a_second_server_on_one_folder_refuses_to_start(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as first, client_of(first) as client:
        with serving(tmp_path, TEST_MODELS) as second:
            second.wait_for(rf"another server is using {tmp_path}; give this one its own --data-dir")
            assert second.process.wait(60) == 1
            assert "Traceback" not in second.output
        assert client.get("/health/ready").status_code == 200


def test_a_stop_gives_back_what_it_cannot_finish(tmp_path: Path, gate: Gate) -> None:
    data_dir = tmp_path / "data"
    request = {"prompt": str(gate.path), "seed": 7, "num_inference_steps": 50}
    with serving(data_dir, TEST_MODELS, shutdown_grace="0") as first, client_of(first) as client:
        path = submit(client, request, "test/gate")
        in_progress(client, path)
        first.process.terminate()
        first.wait_for("stopping")
        gate.let(1)
        assert first.process.wait(60) == 0
        assert "Traceback" not in first.output
    gate.let(50)
    with serving(data_dir, TEST_MODELS) as second, client_of(second) as client:
        assert completed(client, path).get("error") is None
        assert second.stop() == 0
    assert rows(data_dir, "SELECT status, attempt FROM jobs") == [(200, 2)]


def test_a_stop_without_work_is_clean(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as server, client_of(server) as client:
        assert client.get("/health").status_code == 200
        assert server.stop() == 0
        assert "Traceback" not in server.output


def test_work_that_can_be_finished_within_the_grace_is_finished(tmp_path: Path, gate: Gate) -> None:
    data_dir = tmp_path / "data"
    request = {"prompt": str(gate.path), "seed": 7, "num_inference_steps": 2}
    with serving(data_dir, TEST_MODELS, shutdown_grace="60") as server, client_of(server) as client:
        path = submit(client, request, "test/gate")
        in_progress(client, path)
        server.process.terminate()
        server.wait_for("stopping")
        gate.let(2)
        assert server.process.wait(60) == 0
    assert rows(data_dir, "SELECT status, attempt FROM jobs") == [(200, 1)]
