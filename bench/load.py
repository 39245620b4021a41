"""Submits and status polls a second against the null model, and what 100,000 waiting requests cost.

    python -m bench.load [--clients 64] [--seconds 5]

The load comes from a process of its own on the same machine; absolute figures hold for an idle machine only.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.client import measure, request
from server import wire
from server.database import Database
from server.jobs import Job, Submission
from server.notifier import Notifier
from server.queue import Queue
from tests.serving import serving

BODY = json.dumps({"prompt": "a red apple", "image_size": "square", "num_inference_steps": 1}).encode()


def _http(clients: int, seconds: float) -> None:
    asked = {waiting: _asked(waiting, clients, seconds) for waiting in (100, 500, 100_000)}
    ratio = asked[100] / asked[100_000]
    print(f"{'a status over HTTP':40} {ratio:.2f}x with 100,000 queued what it costs with 100")


def _asked(waiting: int, clients: int, seconds: float) -> float:
    """Status of the last of so many, then submits; answers the statuses a second."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The gate model holds the worker, so that what is submitted stays queued.
        gate = folder / "gate"
        os.mkfifo(gate)
        last = _filled(folder / "data", waiting + 8, json.dumps({"prompt": str(gate), "seed": 1}))
        with serving(folder / "data", "demo", max_queue_length="1000000") as server:
            port = int(server.ready().url.rsplit(":", 1)[1])
            figures = measure(port, request("GET", f"/queue/test/gate/requests/{last}/status"), clients, seconds)
            _print(f"status, {clients} clients, {waiting} queued", figures)
            if waiting == 500:
                submit = request("POST", "/queue/test/null", BODY)
                _print(f"submit, {clients} clients", measure(port, submit, clients, seconds))
            return figures["per_second"]


def _filled(data_dir: Path, waiting: int, text: str) -> str:
    """A data folder in which so many requests wait; the id of the last."""
    database = Database(data_dir)
    queue = Queue(database, Notifier(), max_length=10**6)
    submission = Submission("test/gate", "everybody", text, "http://127.0.0.1")
    jobs = [queue.submit(submission) for _ in range(waiting)]
    database.close()
    return jobs[-1].request_id


def _print(name: str, figures: dict[str, float]) -> None:
    print(f"{name:40}", *(f"{key} {value:.1f}" for key, value in figures.items()), flush=True)


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
    return wire.status(job, queue.position(job), None)


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
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    _http(options.clients, options.seconds)
    _queue_cost()


if __name__ == "__main__":
    main()
