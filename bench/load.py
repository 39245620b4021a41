"""The rates of submits and status polls that a server answers, and the cost of 100,000 waiting requests.

    python -m bench.load [--clients 64 256] [--seconds 5]

The clients run in another process than the server, on the same machine; absolute figures hold for an idle machine only.
The server is killed at the end, and every request that it acknowledged is looked up in its database.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.support.load_client import Figures, load, repeating_client, request
from server.api import responses
from server.queue.jobs import Job, Submission
from server.queue.notifier import Notifier
from server.queue.queue import Queue
from server.storage.database import Database
from tests.support.server_process import TEST_MODELS, serving

BODY = json.dumps({"prompt": "a red apple", "image_size": "square", "num_inference_steps": 1}).encode()


@contextmanager
def _queued(directory: Path, waiting: int) -> Iterator[tuple[int, bytes]]:
    """Run a server with `waiting` queued requests; yield its port and a request for the status of the last one."""
    # The gate model blocks the worker, so that submitted requests stay queued.
    gate = directory / "gate"
    os.mkfifo(gate)
    last = _fill_queue(directory / "data", waiting + 8, json.dumps({"prompt": str(gate), "seed": 1}))
    with serving(directory / "data", TEST_MODELS, max_queue_length="1000000") as server:
        yield int(server.ready().url.rsplit(":", 1)[1]), request("GET", f"/queue/test/gate/requests/{last}/status")


def under_load(clients: int, seconds: float) -> tuple[Figures, Figures]:
    """Measure polls of the status of the last of 500 queued requests, then submits; return the figures of both.

    Raises AssertionError if an acknowledged request is not in the database.
    """
    with tempfile.TemporaryDirectory() as name:
        with _queued(Path(name), 500) as (port, status):
            polled = load(port, clients, repeating_client(status, seconds))
            submitted = load(port, clients, repeating_client(request("POST", "/queue/test/null", BODY), seconds))
        database = Database(Path(name) / "data")
        stored = {row["request_id"].encode() for row in database.read("SELECT request_id FROM jobs")}
        database.close()
    acknowledged = set(submitted.request_ids)
    assert len(acknowledged) == len(submitted.request_ids), "two acknowledged requests have the same id"
    assert acknowledged <= stored, f"{len(acknowledged - stored)} of {len(acknowledged)} acknowledged requests are lost"
    return polled, submitted


def _http(clients: list[int], seconds: float) -> None:
    for number in clients:
        polled, submitted = under_load(number, seconds)
        print(f"{f'status, {number} clients, 500 queued':40} {polled}")
        print(f"{f'submit, {number} clients':40} {submitted}", flush=True)
    ratio = _statuses_per_second(100, clients[0]) / _statuses_per_second(100_000, clients[0])
    print(f"{'a status over HTTP':40} costs {ratio:.2f}x as much with 100,000 queued as with 100")


def _statuses_per_second(waiting: int, clients: int) -> float:
    with tempfile.TemporaryDirectory() as name, _queued(Path(name), waiting) as (port, status):
        figures = load(port, clients, repeating_client(status, 5))
    print(f"{f'status, {clients} clients, {waiting} queued':40} {figures}", flush=True)
    return figures.per_second


def _fill_queue(data_dir: Path, waiting: int, body: str) -> str:
    """Queue `waiting` requests in a new data directory; return the id of the last one."""
    database = Database(data_dir)
    queue = Queue(database, Notifier(), max_length=10**6)
    submission = Submission("test/gate", "everybody", body, "http://127.0.0.1")
    jobs = [queue.submit(submission) for _ in range(waiting)]
    database.close()
    return jobs[-1].request_id


def _queue_cost() -> None:
    """Print the median cost of a status with its position, and of a claim, with 100 and with 100,000 waiting."""
    costs = {}
    for waiting in (100, 100_000):
        with tempfile.TemporaryDirectory() as directory:
            queue = Queue(Database(Path(directory)), Notifier(), max_length=10**6)
            submission = Submission("test/null", "everybody", BODY.decode(), "http://127.0.0.1")
            jobs = [queue.submit(submission) for _ in range(waiting)]
            costs[waiting] = (
                _median_seconds(partial(_status, queue, jobs[-1]), 2000),
                _median_seconds(queue.claim, 50),
            )
    for index, name in enumerate(("status with position", "claim")):
        few, many = costs[100][index], costs[100_000][index]
        print(f"{name:40} {few * 1e6:.1f} µs with 100, {many * 1e6:.1f} µs with 100,000 waiting: {many / few:.2f}x")


def _status(queue: Queue, job: Job) -> dict[str, Any]:
    return responses.status_body(job, queue.position(job), None)


def _median_seconds(call: Callable[[], object], count: int) -> float:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Measure over HTTP, then the queue alone in this process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    _http(options.clients, options.seconds)
    _queue_cost()


if __name__ == "__main__":
    main()
