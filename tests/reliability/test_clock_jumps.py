"""The clock jumps by an hour or a year, either way, at any moment: nothing that was accepted is lost."""

import asyncio
import random
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer

from server.queue.jobs import State
from server.queue.retention import Retention
from server.webhooks.delivery import WebhookSender
from server.worker.worker import Worker
from tests.support.components import Clock, Parts, opened, submission
from tests.support.repeats import rounds
from tests.unit.webhooks.test_delivery import delivered, webhooks
from tests.unit.worker.test_worker import SMALL, ready, worked_off

HOUR, DAY = 3600.0, 86_400.0
JUMPS = (HOUR, -HOUR, 366 * DAY, -366 * DAY)
MAX_AGE = 7 * DAY
ACTS = 30


@dataclass
class Life:
    """A server's parts on one clock, through any number of starts, and what was asked of it."""

    folder: Path
    hook: str
    rng: random.Random
    clock: Clock = field(default_factory=Clock)
    stack: ExitStack = field(default_factory=ExitStack)
    #: Until when each request must have started, if it said so.
    deadlines: dict[str, float | None] = field(default_factory=dict)
    hooked: set[str] = field(default_factory=set)
    #: What may be gone: too late to start, or older than what is kept.
    late: set[str] = field(default_factory=set)
    old: set[str] = field(default_factory=set)

    def start(self) -> None:
        """As after kill -9, or for the first time."""
        self.stack.close()
        self.parts: Parts = self.stack.enter_context(opened(self.folder, clock=self.clock))
        self.parts.queue.recover()
        self.parts.files.delete_orphans()
        self.worker: Worker = ready(self.parts)
        self.hooks: WebhookSender = webhooks(self.parts)
        self.retention = Retention(
            self.parts.database, self.parts.queue, self.parts.files, max_age=MAX_AGE, max_bytes=1e9, clock=self.clock
        )

    # -- what happens

    def submit(self) -> None:
        deadline = self.clock.now + self.rng.choice([60.0, 2 * HOUR]) if self.rng.random() < 0.2 else None
        hook = self.hook if self.rng.random() < 0.3 else None
        job = self.parts.queue.submit(submission(fields=SMALL, start_deadline=deadline, webhook_url=hook))
        self.deadlines[job.request_id] = deadline
        self.hooked |= {job.request_id} if hook else set()

    def work(self) -> None:
        """Some turns; who is late when its turn to be claimed comes ends then."""
        late = self.late_ones()
        for _ in range(self.rng.randint(1, 4)):
            self.worker.run_once()
        self.late |= late - self.late_ones()

    def late_ones(self) -> set[str]:
        """Those that wait although their deadline has passed."""
        waiting = self.parts.rows("SELECT request_id FROM jobs WHERE state = 'IN_QUEUE'")
        return {name for (name,) in waiting if (deadline := self.deadlines[name]) and deadline <= self.clock.now}

    def jump(self) -> None:
        self.clock.now += self.rng.choice(JUMPS)

    def wait(self) -> None:
        self.clock.now += self.rng.uniform(0, 30)

    def expire(self) -> None:
        late = self.late_ones()
        assert self.parts.queue.fail_expired() == len(late)
        self.late |= late

    def sweep(self) -> None:
        done = self.parts.rows("SELECT request_id, finished_at FROM jobs WHERE state = 'COMPLETED'")
        due = self.parts.rows("SELECT request_id FROM deliveries WHERE due_at IS NOT NULL")
        old = {name for name, ended in done if ended <= self.clock.now - MAX_AGE and (name,) not in due}
        assert self.retention.sweep() == len(old)
        self.old |= old

    def deliver(self) -> None:
        asyncio.run(delivered(self.hooks))

    def act(self) -> None:
        """One of them."""
        acts = (self.submit, self.work, self.jump, self.wait, self.expire, self.sweep, self.deliver, self.start)
        self.rng.choices(acts, weights=(8, 8, 6, 3, 2, 3, 2, 1))[0]()

    # -- how it ends

    def judge(self) -> None:
        """Once all that can be done is done, everything that was accepted has its end, and every end was told."""
        self.expire()
        worked_off(self.worker)
        # The clock is right from now on, whatever it was when the webhooks fell due.
        right = self.clock.now
        while self.parts.rows("SELECT 1 FROM deliveries WHERE due_at IS NOT NULL"):
            assert self.clock.now <= right + 2 * HOUR
            self.clock.now += asyncio.run(delivered(self.hooks))
        found = dict(self.parts.rows("SELECT request_id, status FROM jobs"))
        assert found.keys() == self.deadlines.keys() - self.old
        assert {name for name, status in found.items() if status != 200} == self.late - self.old
        assert self.parts.rows("SELECT state FROM jobs WHERE state <> ?", State.COMPLETED) == []
        assert self.parts.rows("SELECT name FROM files ORDER BY name") == [(name,) for name in self.parts.on_disk()]
        assert len(self.parts.on_disk()) == sum(status == 200 for status in found.values())
        self.stack.close()


@pytest.mark.parametrize("number", rounds(20, 200))
def test_nothing_is_lost(tmp_path: Path, httpserver: HTTPServer, number: int) -> None:
    httpserver.expect_request("/hook").respond_with_data()
    life = Life(tmp_path / "data", httpserver.url_for("/hook"), random.Random(number))
    life.start()
    for _ in range(ACTS):
        life.act()
    life.judge()
    # Told of each at least once, the forgotten ones too.
    assert {request.json["request_id"] for request, _ in httpserver.log} == life.hooked
