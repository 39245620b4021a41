"""Submits and status polls a second against the null model, and what 100,000 waiting requests cost.

    python -m bench.load [--clients 64] [--seconds 5]

The load comes from a process of its own on the same machine; absolute figures hold for an idle machine only.
"""

import argparse
import asyncio
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

import uvloop

from server import wire
from server.database import Database
from server.jobs import Job, Submission
from server.notifier import Notifier
from server.queue import Queue
from tests.serving import serving

BODY = json.dumps({"prompt": "a red apple", "image_size": "square", "num_inference_steps": 1}).encode()


class Client(asyncio.Protocol):
    """One connection that sends its next request as soon as the last is answered."""

    def __init__(self, request: bytes, deadline: float) -> None:
        self.request, self.deadline = request, deadline
        self.seconds: list[float] = []
        self.bad = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Count the answer when all of it is here, and go on."""
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0]) if separator else 0
        if not separator or len(body) < length:
            return
        self.bad += not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 202"))
        self.seconds.append(time.perf_counter() - self._sent)
        self._buffer = b""
        if time.monotonic() < self.deadline:
            self._send()
        else:
            self.transport.close()
            self.done.set_result(None)

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self.transport.write(self.request)  # type: ignore[attr-defined]


async def _load(port: int, request: bytes, clients: int, seconds: float) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    deadline = time.monotonic() + seconds
    begun = time.perf_counter()
    made = [await loop.create_connection(lambda: Client(request, deadline), "127.0.0.1", port) for _ in range(clients)]
    await asyncio.gather(*(client.done for _, client in made))
    taken = time.perf_counter() - begun
    times = sorted(second for _, client in made for second in client.seconds)
    return {
        "per_second": len(times) / taken,
        "p50_ms": 1000 * statistics.median(times),
        "p99_ms": 1000 * times[int(len(times) * 0.99)],
        "bad": sum(client.bad for _, client in made),
    }


def _request(method: str, path: str, body: bytes = b"") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body


def _measure(port: int, request: bytes, clients: int, seconds: float) -> dict[str, float]:
    return uvloop.run(_load(port, request, clients, seconds))


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
            figures = _measure(port, _request("GET", f"/queue/test/gate/requests/{last}/status"), clients, seconds)
            _print(f"status, {clients} clients, {waiting} queued", figures)
            if waiting == 500:
                submit = _request("POST", "/queue/test/null", BODY)
                _print(f"submit, {clients} clients", _measure(port, submit, clients, seconds))
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
