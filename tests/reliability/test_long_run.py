"""Test of 100,000 requests on one server with short retention: neither memory nor database grows."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from bench.load import BODY
from bench.support.load_client import Client, load, request
from tests.support.components import open_components
from tests.support.server_process import ROOT, Server, serving

NUM_REQUESTS, NUM_CLIENTS = 100_000, 32
RETENTION_SECONDS = 10
SUBMIT, RUN = request("POST", "/queue/test/null", BODY), request("POST", "/test/null", BODY)
MIB = 2**20


@dataclass
class Monitor:
    """Counter of accepted requests, which also samples the server's memory and database size."""

    server: Server
    process: psutil.Process
    accepted: int = 0
    #: Samples of accepted requests, resident memory in bytes and database size in bytes.
    samples: list[tuple[int, int, int]] = field(default_factory=list)

    def count(self) -> None:
        """Count an accepted request, and take a sample after every 500."""
        self.accepted += 1
        if self.accepted % 500 == 0:
            size = sum(path.stat().st_size for path in self.server.data_dir.glob("queue.sqlite3*"))
            self.samples.append((self.accepted, self.process.memory_info().rss, size))

    def is_enough(self) -> bool:
        return self.accepted >= NUM_REQUESTS


class QueueAndRunClient(Client):
    """Client that submits a request to the queue, runs a second one, then polls the first and fetches its result."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__(SUBMIT, monitor.is_enough)
        self.monitor = monitor
        self.path = ""

    def next_request(self, body: bytes) -> bytes:
        if self.request is SUBMIT:
            self.monitor.count()
            self.path = "/queue/test/null/requests/" + json.loads(body)["request_id"]
            return RUN
        if self.request is RUN:
            self.monitor.count()
            return request("GET", f"{self.path}/status?logs=1")
        if b'"COMPLETED"' in body:
            return request("GET", self.path)
        # The body is either the result or a status that is not yet COMPLETED.
        return SUBMIT if b'"images"' in body else self.request


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_requests(tmp_path: Path) -> None:
    settings = {
        "models_dir": str(ROOT / "tests" / "support" / "faults" / "fast_expiry"),
        "retention_days": str(RETENTION_SECONDS / 86_400),
    }
    with serving(tmp_path / "data", "test/null=demo", **settings) as server:
        port = int(server.ready().url.rsplit(":", 1)[1])
        monitor = Monitor(server, psutil.Process(server.process.pid))
        figures = load(port, NUM_CLIENTS, lambda: QueueAndRunClient(monitor))
        assert server.stop() == 0
    assert figures.bad == 0
    # Skip the first fifth, in which caches and the allocator fill up.
    settled = [sample for sample in monitor.samples if sample[0] > NUM_REQUESTS / 5]
    slope = statistics.linear_regression([sample[0] for sample in settled], [sample[1] for sample in settled]).slope
    third = max(size for accepted, _, size in monitor.samples if accepted <= NUM_REQUESTS / 3)
    end = monitor.samples[-1][2]
    print(f"{monitor.accepted} requests in {figures.elapsed:.0f} s, {monitor.accepted / figures.elapsed:.0f} a second")
    print(f"resident memory: {settled[0][1] / MIB:.1f} MiB, then {settled[-1][1] / MIB:.1f} MiB;", end=" ")
    print(f"{slope * 10_000 / MIB:+.3f} MiB per 10,000 requests")
    print(f"database: {third / MIB:.1f} MiB at a third, {end / MIB:.1f} MiB at the end")
    assert slope * 10_000 < MIB, monitor.samples
    assert end <= 1.1 * third, monitor.samples
    with open_components(tmp_path / "data") as components:
        # Every request ran once, and retention has deleted most of them.
        assert components.rows("SELECT sum(requests) FROM usage") == [(monitor.accepted,)]
        assert components.rows("SELECT count(*) FROM jobs WHERE status IS NOT 200") == [(0,)]
        assert [(name,) for name in components.stored_file_names()] == components.rows(
            "SELECT name FROM files ORDER BY name"
        )
        assert len(components.stored_file_names()) < NUM_REQUESTS / 2
