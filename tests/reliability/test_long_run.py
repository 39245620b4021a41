"""A hundred thousand requests through one server that forgets them soon: neither its memory nor its database grows."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from bench.load import BODY
from bench.support.load_client import Client, load, request
from tests.support.components import opened
from tests.support.server_process import ROOT, Server, serving

NUMBER, CLIENTS = 100_000, 32
#: Seconds that a result is kept.
KEPT = 10
QUEUED, RUN = request("POST", "/queue/test/null", BODY), request("POST", "/test/null", BODY)
MIB = 2**20


@dataclass
class Watch:
    """Counts the requests, and looks at the server now and then."""

    server: Server
    process: psutil.Process
    accepted: int = 0
    #: After so many requests: resident memory and the database's size, in bytes.
    looks: list[tuple[int, int, int]] = field(default_factory=list)

    def count(self) -> None:
        """One more was accepted."""
        self.accepted += 1
        if self.accepted % 500 == 0:
            size = sum(path.stat().st_size for path in self.server.data_dir.glob("queue.sqlite3*"))
            self.looks.append((self.accepted, self.process.memory_info().rss, size))

    def is_enough(self) -> bool:
        return self.accepted >= NUMBER


class Visitor(Client):
    """Puts one request into the queue, waits for another on the line, then reads what became of the first."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(QUEUED, watch.is_enough)
        self.watch = watch
        self.path = ""

    def next_request(self, body: bytes) -> bytes:
        if self.request is QUEUED:
            self.watch.count()
            self.path = "/queue/test/null/requests/" + json.loads(body)["request_id"]
            return RUN
        if self.request is RUN:
            self.watch.count()
            return request("GET", f"{self.path}/status?logs=1")
        if b'"COMPLETED"' in body:
            return request("GET", self.path)
        # Not done yet, or the answer itself.
        return QUEUED if b'"images"' in body else self.request


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_requests(tmp_path: Path) -> None:
    settings = {
        "models_dir": str(ROOT / "tests" / "support" / "faults" / "forgetful"),
        "retention_days": str(KEPT / 86_400),
    }
    with serving(tmp_path / "data", "test/null=demo", **settings) as server:
        port = int(server.ready().url.rsplit(":", 1)[1])
        watch = Watch(server, psutil.Process(server.process.pid))
        figures = load(port, CLIENTS, lambda: Visitor(watch))
        assert server.stop() == 0
    assert figures.bad == 0
    # Without the beginning, in which caches and the allocator fill up.
    settled = [look for look in watch.looks if look[0] > NUMBER / 5]
    slope = statistics.linear_regression([look[0] for look in settled], [look[1] for look in settled]).slope
    third = max(size for accepted, _, size in watch.looks if accepted <= NUMBER / 3)
    end = watch.looks[-1][2]
    print(f"{watch.accepted} requests in {figures.taken:.0f} s, {watch.accepted / figures.taken:.0f} a second")
    print(f"resident memory: {settled[0][1] / MIB:.1f} MiB, then {settled[-1][1] / MIB:.1f} MiB;", end=" ")
    print(f"{slope * 10_000 / MIB:+.3f} MiB per 10,000 requests")
    print(f"database: {third / MIB:.1f} MiB at a third, {end / MIB:.1f} MiB at the end")
    assert slope * 10_000 < MIB, watch.looks
    assert end <= 1.1 * third, watch.looks
    with opened(tmp_path / "data") as parts:
        # Each was painted once, and most are forgotten.
        assert parts.rows("SELECT sum(requests) FROM usage") == [(watch.accepted,)]
        assert parts.rows("SELECT count(*) FROM jobs WHERE status IS NOT 200") == [(0,)]
        assert [(name,) for name in parts.on_disk()] == parts.rows("SELECT name FROM files ORDER BY name")
        assert len(parts.on_disk()) < NUMBER / 2
