"""Submits and status polls a second against the null model, and what 100,000 waiting requests cost.

    python -m bench.load [--clients 64 256] [--seconds 5]

The load comes from a process of its own on the same machine; absolute figures hold for an idle machine only. The server
is killed at the end, and whatever it acknowledged is looked for in its database.
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

from bench.support.load_client import Figures, again, load, request
from server.api import responses
from server.queue.jobs import Job, Submission
from server.queue.notifier import Notifier
from server.queue.queue import Queue
from server.storage.database import Database
from tests.support.server_process import TEST_MODELS, serving

BODY = json.dumps({"prompt": "a red apple", "image_size": "square", "num_inference_steps": 1}).encode()


@contextmanager
def _queued(folder: Path, waiting: int) -> Iterator[tuple[int, bytes]]:
    """A server in which so many wait and nobody is painted for: its port, and a request for the last one's status."""
    # The gate model holds the worker, so that what is submitted stays queued.
    gate = folder / "gate"
    os.mkfifo(gate)
    last = _filled(folder / "data", waiting + 8, json.dumps({"prompt": str(gate), "seed": 1}))
    with serving(folder / "data", TEST_MODELS, max_queue_length="1000000") as server:
        yield int(server.ready().url.rsplit(":", 1)[1]), request("GET", f"/queue/test/gate/requests/{last}/status")


def under_load(clients: int, seconds: float) -> tuple[Figures, Figures]:
    """Status of the last of 500, then submits. Raises AssertionError for what was acknowledged and is not there."""
    with tempfile.TemporaryDirectory() as name:
        with _queued(Path(name), 500) as (port, status):
            asked = load(port, clients, again(status, seconds))
            submitted = load(port, clients, again(request("POST", "/queue/test/null", BODY), seconds))
        database = Database(Path(name) / "data")
        there = {row["request_id"].encode() for row in database.read("SELECT request_id FROM jobs")}
        database.close()
    acknowledged = set(submitted.request_ids)
    assert len(acknowledged) == len(submitted.request_ids), "one id stands for two requests"
    assert acknowledged <= there, f"{len(acknowledged - there)} of {len(acknowledged)} acknowledged requests are lost"
    return asked, submitted


def _http(clients: list[int], seconds: float) -> None:
    for number in clients:
        asked, submitted = under_load(number, seconds)
        print(f"{f'status, {number} clients, 500 queued':40} {asked}")
        print(f"{f'submit, {number} clients':40} {submitted}", flush=True)
    ratio = _statuses_per_second(100, clients[0]) / _statuses_per_second(100_000, clients[0])
    print(f"{'a status over HTTP':40} {ratio:.2f}x with 100,000 queued what it costs with 100")


def _statuses_per_second(waiting: int, clients: int) -> float:
    with tempfile.TemporaryDirectory() as name, _queued(Path(name), waiting) as (port, status):
        figures = load(port, clients, again(status, 5))
    print(f"{f'status, {clients} clients, {waiting} queued':40} {figures}", flush=True)
    return figures.per_second


def _filled(data_dir: Path, waiting: int, text: str) -> str:
    """A data folder in which so many requests wait; the id of the last."""
    database = Database(data_dir)
    queue = Queue(database, Notifier(), max_length=10**6)
    submission = Submission("test/gate", "everybody", text, "http://127.0.0.1")
    jobs = [queue.submit(submission) for _ in range(waiting)]
    database.close()
    return jobs[-1].request_id


def _queue_cost() -> None:
    """A status with its position, and a claim, with 100 and with 100,000 waiting; in one process, medians."""
    costs = {}
    for waiting in (100, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            queue = Queue(Database(Path(folder)), Notifier(), max_length=10**6)
            submission = Submission("test/null", "everybody", BODY.decode(), "http://127.0.0.1")
            jobs = [queue.submit(submission) for _ in range(waiting)]
            costs[waiting] = (
                _median(partial(_status, queue, jobs[-1]), 2000),
                _median(queue.claim, 50),
            )
    for index, name in enumerate(("status with position", "claim")):
        few, many = costs[100][index], costs[100_000][index]
        print(f"{name:40} {few * 1e6:.1f} µs with 100, {many * 1e6:.1f} µs with 100,000 waiting: {many / few:.2f}x")


def _status(queue: Queue, job: Job) -> dict[str, Any]:
    return responses.status_body(job, queue.position(job), None)


def _median(act: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        act()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    _http(options.clients, options.seconds)
    _queue_cost()


if __name__ == "__main__":
    main()
