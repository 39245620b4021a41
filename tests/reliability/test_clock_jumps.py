"""Tests of clock jumps by an hour or a year, in both directions, at any moment: no accepted request is lost."""

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
from tests.support.components import Clock, Components, open_components, submission
from tests.support.repeats import round_params
from tests.unit.webhooks.test_delivery import send_and_wait, webhooks
from tests.unit.worker.test_worker import SMALL, ready_worker, run_all

HOUR, DAY = 3600.0, 86_400.0
JUMPS = (HOUR, -HOUR, 366 * DAY, -366 * DAY)
MAX_AGE = 7 * DAY
NUM_ACTIONS = 30


@dataclass
class Simulation:
    """A server's components on one manual clock, with a record of the submitted requests that survives restarts."""

    data_dir: Path
    webhook_url: str
    rng: random.Random
    clock: Clock = field(default_factory=Clock)
    stack: ExitStack = field(default_factory=ExitStack)
    #: Start deadline of each request, if it has one.
    deadlines: dict[str, float | None] = field(default_factory=dict)
    with_webhook: set[str] = field(default_factory=set)
    #: Requests failed after their start deadline, and requests deleted by retention.
    expired: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)

    def start(self) -> None:
        """Start for the first time, or again as after kill -9."""
        self.stack.close()
        self.parts: Components = self.stack.enter_context(open_components(self.data_dir, clock=self.clock))
        self.parts.queue.recover()
        self.parts.files.delete_orphans()
        self.worker: Worker = ready_worker(self.parts)
        self.webhook_sender: WebhookSender = webhooks(self.parts)
        self.retention = Retention(
            self.parts.database, self.parts.queue, self.parts.files, max_age=MAX_AGE, max_bytes=1e9, clock=self.clock
        )

    # -- random actions

    def submit(self) -> None:
        deadline = self.clock.now + self.rng.choice([60.0, 2 * HOUR]) if self.rng.random() < 0.2 else None
        url = self.webhook_url if self.rng.random() < 0.3 else None
        job = self.parts.queue.submit(submission(fields=SMALL, start_deadline=deadline, webhook_url=url))
        self.deadlines[job.request_id] = deadline
        self.with_webhook |= {job.request_id} if url else set()

    def work(self) -> None:
        """Run the worker a few times. An overdue request fails when the worker would claim it."""
        overdue = self.overdue()
        for _ in range(self.rng.randint(1, 4)):
            self.worker.run_once()
        self.expired |= overdue - self.overdue()

    def overdue(self) -> set[str]:
        """Return the waiting requests whose start deadline has passed."""
        waiting = self.parts.rows("SELECT request_id FROM jobs WHERE state = 'IN_QUEUE'")
        return {
            request_id
            for (request_id,) in waiting
            if (deadline := self.deadlines[request_id]) and deadline <= self.clock.now
        }

    def jump(self) -> None:
        self.clock.now += self.rng.choice(JUMPS)

    def wait(self) -> None:
        self.clock.now += self.rng.uniform(0, 30)

    def expire(self) -> None:
        overdue = self.overdue()
        assert self.parts.queue.fail_expired() == len(overdue)
        self.expired |= overdue

    def sweep(self) -> None:
        completed = self.parts.rows("SELECT request_id, finished_at FROM jobs WHERE state = 'COMPLETED'")
        due = self.parts.rows("SELECT request_id FROM deliveries WHERE due_at IS NOT NULL")
        deleted = {
            request_id
            for request_id, finished_at in completed
            if finished_at <= self.clock.now - MAX_AGE and (request_id,) not in due
        }
        assert self.retention.sweep() == len(deleted)
        self.deleted |= deleted

    def deliver(self) -> None:
        asyncio.run(send_and_wait(self.webhook_sender))

    def random_action(self) -> None:
        """Perform one random action."""
        actions = (self.submit, self.work, self.jump, self.wait, self.expire, self.sweep, self.deliver, self.start)
        self.rng.choices(actions, weights=(8, 8, 6, 3, 2, 3, 2, 1))[0]()

    # -- final check

    def finish_and_check(self) -> None:
        """Finish all work, then check that every accepted request has a final state and that no webhook is due."""
        self.expire()
        run_all(self.worker)
        # The clock no longer jumps. Two hours suffice, whatever the clock showed when a webhook fell due.
        settled_at = self.clock.now
        while self.parts.rows("SELECT 1 FROM deliveries WHERE due_at IS NOT NULL"):
            assert self.clock.now <= settled_at + 2 * HOUR
            self.clock.now += asyncio.run(send_and_wait(self.webhook_sender))
        statuses = dict(self.parts.rows("SELECT request_id, status FROM jobs"))
        assert statuses.keys() == self.deadlines.keys() - self.deleted
        assert {request_id for request_id, status in statuses.items() if status != 200} == self.expired - self.deleted
        assert self.parts.rows("SELECT state FROM jobs WHERE state <> ?", State.COMPLETED) == []
        assert self.parts.rows("SELECT name FROM files ORDER BY name") == [
            (name,) for name in self.parts.stored_file_names()
        ]
        assert len(self.parts.stored_file_names()) == sum(status == 200 for status in statuses.values())
        self.stack.close()


@pytest.mark.parametrize("number", round_params(20, 200))
def test_no_request_is_lost(tmp_path: Path, httpserver: HTTPServer, number: int) -> None:
    httpserver.expect_request("/hook").respond_with_data()
    simulation = Simulation(tmp_path / "data", httpserver.url_for("/hook"), random.Random(number))
    simulation.start()
    for _ in range(NUM_ACTIONS):
        simulation.random_action()
    simulation.finish_and_check()
    # Every webhook is delivered at least once, also for requests that retention has deleted.
    assert {request.json["request_id"] for request, _ in httpserver.log} == simulation.with_webhook
