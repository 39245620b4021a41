"""Tests that compare the queue with a small model: any actions in any order give the same state."""

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from server.errors import TooManyRequests
from server.queue.jobs import Mode, Priority, State
from server.queue.retention import Retention
from server.queue.retry import MAX_ATTEMPTS, MAX_CRASHES
from tests.support.components import Clock, Components, open_components, submission, success

MAX_AGE = 7 * 86_400.0
PER_OWNER, RUNNING_PER_OWNER = 6, 2
REQUESTS = st.tuples(
    st.sampled_from(["me", "you", "she"]),
    # Queue requests survive a restart. The others are included to check that they are cancelled.
    st.sampled_from([Mode.QUEUE, Mode.QUEUE, Mode.RUN]),
    st.sampled_from(list(Priority)),
    st.sampled_from([None, None, 1.0, 60.0]),
    # An Idempotency-Key.
    st.sampled_from([None, None, None, "a", "b"]),
)
JUMPS = (0.0, 0.5, 30.0, 3600.0, -3600.0, 86_400.0, 366 * 86_400.0)


@dataclass
class Entry:
    """One request in the model."""

    rank: tuple[bool, int]
    owner: str
    mode: Mode
    deadline: float | None
    key: str | None
    state: State = State.IN_QUEUE
    attempt: int = 0
    crash_count: int = 0
    is_cancelled: bool = False
    status: int | None = None
    finished_at: float = 0.0


class QueueAndModel(RuleBasedStateMachine):
    """State machine of all actions of clients, worker and clock, with a kill of the process between any two."""

    def __init__(self) -> None:
        super().__init__()
        self.data_dir = Path(tempfile.mkdtemp(prefix="queue-model-"))
        self.clock = Clock()
        self.entries: dict[str, Entry] = {}
        self.stack = ExitStack()
        self.number = 0

    @initialize()
    def start(self) -> None:
        """Open the data directory, as a server does when it starts."""
        self.parts: Components = self.stack.enter_context(
            open_components(
                self.data_dir,
                clock=self.clock,
                max_length_per_owner=PER_OWNER,
                max_running_per_owner=RUNNING_PER_OWNER,
            )
        )
        self.retention = Retention(
            self.parts.database, self.parts.queue, self.parts.files, max_age=MAX_AGE, max_bytes=1e9, clock=self.clock
        )

    def teardown(self) -> None:
        """Close the server's components and delete the data directory."""
        self.stack.close()
        shutil.rmtree(self.data_dir)

    # -- the model

    def in_state(self, state: State) -> list[str]:
        """Return the requests in this state, in the order of the queue."""
        names = [name for name, entry in self.entries.items() if entry.state == state]
        return sorted(names, key=lambda name: self.entries[name].rank)

    def end(self, name: str, status: int) -> None:
        entry = self.entries[name]
        entry.state, entry.status, entry.finished_at = State.COMPLETED, status, self.clock.now
        entry.is_cancelled = False

    def requeue(self, name: str) -> None:
        if self.entries[name].is_cancelled:
            self.end(name, 499)
        else:
            self.entries[name].state = State.IN_QUEUE

    def requeue_or_fail(self, name: str) -> None:
        """Requeue a request whose worker was lost, or fail it after too many crashes or attempts."""
        entry = self.entries[name]
        if not entry.is_cancelled and (entry.crash_count >= MAX_CRASHES or entry.attempt >= MAX_ATTEMPTS):
            self.end(name, 500)
        else:
            self.requeue(name)

    def draw_request(self, data: Any, state: State) -> str:
        return str(data.draw(st.sampled_from(self.in_state(state))))

    # -- actions of clients

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=5))
    def submit(self, requests: list[tuple[str, Mode, Priority, float | None, str | None]]) -> None:
        for owner, mode, priority, deadline, key in requests:
            start_deadline = None if deadline is None else self.clock.now + deadline
            request = submission(
                owner=owner, mode=mode, priority=priority, start_deadline=start_deadline, idempotency_key=key
            )
            same = [name for name, entry in self.entries.items() if key and (entry.owner, entry.key) == (owner, key)]
            if same:
                assert [self.parts.queue.submit(request).request_id] == same
                continue
            waiting = sum(entry.owner == owner and entry.state == State.IN_QUEUE for entry in self.entries.values())
            if waiting >= PER_OWNER:
                with pytest.raises(TooManyRequests):
                    self.parts.queue.submit(request)
                continue
            job = self.parts.queue.submit(request)
            self.number += 1
            self.entries[job.request_id] = Entry(
                (priority == Priority.LOW, self.number), owner, mode, start_deadline, key
            )

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.entries, key=lambda each: self.entries[each].rank)))
        entry, job = self.entries[name], self.parts.queue.get(name)
        assert job
        assert self.parts.queue.cancel(job) == entry.state
        if entry.state == State.IN_QUEUE:
            self.end(name, 499)
        elif entry.state == State.IN_PROGRESS:
            entry.is_cancelled = True

    # -- actions of the worker

    @precondition(lambda self: self.in_state(State.IN_QUEUE))
    @rule(takes_low=st.booleans(), slots=st.integers(1, 8))
    def claim(self, takes_low: bool, slots: int) -> None:
        claimed = self.parts.queue.claim(include_low_priority=takes_low, slots=slots)
        for is_low in (False, True) if takes_low else (False,):
            while name := self.next_to_claim(is_low, slots):
                entry = self.entries[name]
                if entry.deadline is not None and entry.deadline <= self.clock.now:
                    self.end(name, 504)
                    continue
                assert claimed and claimed[0].request_id == name
                entry.state, entry.attempt = State.IN_PROGRESS, entry.attempt + 1
                return
        assert claimed is None

    def next_to_claim(self, is_low: bool, slots: int) -> str | None:
        """Return the next request to claim in queue order, if any. Owners with a full share of the slots come last."""
        running = [(entry.rank[0], entry.owner) for entry in self.entries.values() if entry.state == State.IN_PROGRESS]
        claimable = [
            name
            for name in self.in_state(State.IN_QUEUE)
            if self.entries[name].rank[0] == is_low
            if sum(owner == self.entries[name].owner for _, owner in running) < RUNNING_PER_OWNER
        ]
        owners = {self.entries[name].owner for name in claimable} | {owner for low, owner in running if low == is_low}
        return min(
            claimable,
            default=None,
            key=lambda name: (
                running.count((is_low, self.entries[name].owner)) * len(owners) >= slots,
                self.entries[name].rank,
            ),
        )

    @precondition(lambda self: self.in_state(State.IN_PROGRESS))
    @rule(data=st.data(), action=st.sampled_from(["progress", "finish", "release", "record crash", "requeue or fail"]))
    def work(self, data: Any, action: str) -> None:
        name = self.draw_request(data, State.IN_PROGRESS)
        entry, job = self.entries[name], self.parts.queue.get_cached(name)
        assert job
        if action == "progress":
            self.parts.queue.progress(job, 1, 2)
        elif action == "record crash":
            self.parts.queue.record_crash([job])
            entry.crash_count += 1
        elif action == "finish":
            assert self.parts.queue.finish(job, success()) == (not entry.is_cancelled)
            self.end(name, 499 if entry.is_cancelled else 200)
        elif action == "requeue or fail":
            self.parts.queue.requeue_or_fail(job)
            self.requeue_or_fail(name)
        else:
            self.parts.queue.release(job)
            self.requeue(name)

    # -- actions of the clock

    @precondition(lambda self: self.entries)
    @rule(seconds=st.sampled_from(JUMPS))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.entries)
    @rule()
    def expire(self) -> None:
        overdue = [
            name
            for name in self.in_state(State.IN_QUEUE)
            if (deadline := self.entries[name].deadline) is not None and deadline <= self.clock.now
        ]
        assert self.parts.queue.fail_expired() == len(overdue)
        for name in overdue:
            self.end(name, 504)

    @precondition(lambda self: self.entries)
    @rule()
    def sweep(self) -> None:
        old = [
            name
            for name in self.in_state(State.COMPLETED)
            if self.entries[name].finished_at <= self.clock.now - MAX_AGE
        ]
        assert self.retention.sweep() == len(old)
        for name in old:
            del self.entries[name]

    @precondition(lambda self: self.entries)
    @rule()
    def kill_and_restart(self) -> None:
        """Restart as after kill -9: memory is lost, commits are kept."""
        self.stack.close()
        self.start()
        for name, entry in self.entries.items():
            if entry.state == State.COMPLETED:
                continue
            if entry.mode != Mode.QUEUE:
                self.end(name, 499)
            elif entry.state == State.IN_PROGRESS or entry.crash_count >= MAX_CRASHES:
                self.requeue_or_fail(name)
        assert self.parts.queue.recover() == len(self.in_state(State.IN_QUEUE))

    # -- invariant

    @invariant()
    def queue_equals_model(self) -> None:
        rows = self.parts.rows("SELECT request_id, state, attempt, strikes, status FROM jobs")
        expected = {
            (name, entry.state, entry.attempt, entry.crash_count, entry.status) for name, entry in self.entries.items()
        }
        assert set(rows) == expected
        assert self.parts.queue.length == len(self.in_state(State.IN_QUEUE))
        for position, name in enumerate(self.in_state(State.IN_QUEUE)):
            job = self.parts.queue.get_cached(name)
            assert job and self.parts.queue.position(job) == position
        for name, entry in self.entries.items():
            job = self.parts.queue.get(name)
            assert job and (job.state, job.attempt) == (entry.state, entry.attempt)


def run_state_machine(max_examples: int, steps: int) -> None:
    """Run this many examples of the state machine, of this many steps each."""
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    options = settings(
        max_examples=max_examples, stateful_step_count=steps, deadline=None, database=None, suppress_health_check=checks
    )
    run_state_machine_as_test(QueueAndModel, settings=options)


def test_the_queue_equals_its_model() -> None:
    run_state_machine(50, 30)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_queue_equals_its_model_in_long_runs() -> None:
    run_state_machine(3_000, 40)
