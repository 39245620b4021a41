"""The queue beside a model of it in a few lines: whatever is done, in whatever order, both say the same."""

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
from tests.support.components import Clock, Parts, opened, painted, submission

MAX_AGE = 7 * 86_400.0
PER_OWNER, RUNNING_PER_OWNER = 6, 2
REQUESTS = st.tuples(
    st.sampled_from(["me", "you", "she"]),
    # Those of the queue outlive a restart, the others only show that they do not.
    st.sampled_from([Mode.QUEUE, Mode.QUEUE, Mode.RUN]),
    st.sampled_from(list(Priority)),
    st.sampled_from([None, None, 1.0, 60.0]),
    # An Idempotency-Key.
    st.sampled_from([None, None, None, "a", "b"]),
)
JUMPS = (0.0, 0.5, 30.0, 3600.0, -3600.0, 86_400.0, 366 * 86_400.0)


@dataclass
class Entry:
    """What the model knows of one request."""

    rank: tuple[bool, int]
    owner: str
    mode: Mode
    deadline: float | None
    key: str | None
    state: State = State.IN_QUEUE
    attempt: int = 0
    strikes: int = 0
    is_cancelled: bool = False
    status: int | None = None
    finished_at: float = 0.0


class QueueBesideModel(RuleBasedStateMachine):
    """Every act of clients, of the worker, and of time; and the death of the process at any point between them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="queue-model-"))
        self.clock = Clock()
        self.entries: dict[str, Entry] = {}
        self.stack = ExitStack()
        self.number = 0

    @initialize()
    def start(self) -> None:
        """A server on an empty folder."""
        self.parts: Parts = self.stack.enter_context(
            opened(
                self.folder,
                clock=self.clock,
                max_length_per_owner=PER_OWNER,
                max_running_per_owner=RUNNING_PER_OWNER,
            )
        )
        self.retention = Retention(
            self.parts.database, self.parts.queue, self.parts.files, max_age=MAX_AGE, max_bytes=1e9, clock=self.clock
        )

    def teardown(self) -> None:
        """Nothing stays."""
        self.stack.close()
        shutil.rmtree(self.folder)

    # -- what the model thinks

    def of(self, state: State) -> list[str]:
        """Requests in a state, in the queue's order."""
        found = [name for name, entry in self.entries.items() if entry.state == state]
        return sorted(found, key=lambda name: self.entries[name].rank)

    def ends(self, name: str, status: int) -> None:
        entry = self.entries[name]
        entry.state, entry.status, entry.finished_at = State.COMPLETED, status, self.clock.now
        entry.is_cancelled = False

    def goes_back(self, name: str) -> None:
        if self.entries[name].is_cancelled:
            self.ends(name, 499)
        else:
            self.entries[name].state = State.IN_QUEUE

    def is_lost(self, name: str) -> None:
        """With whoever worked at it."""
        entry = self.entries[name]
        if not entry.is_cancelled and (entry.strikes >= MAX_CRASHES or entry.attempt >= MAX_ATTEMPTS):
            self.ends(name, 500)
        else:
            self.goes_back(name)

    def chosen(self, data: Any, state: State) -> str:
        return str(data.draw(st.sampled_from(self.of(state))))

    # -- what clients do

    @rule(wanted=st.lists(REQUESTS, min_size=1, max_size=5))
    def submit(self, wanted: list[tuple[str, Mode, Priority, float | None, str | None]]) -> None:
        for owner, mode, priority, deadline, key in wanted:
            ends_at = None if deadline is None else self.clock.now + deadline
            request = submission(owner=owner, mode=mode, priority=priority, start_deadline=ends_at, idempotency_key=key)
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
            self.entries[job.request_id] = Entry((priority == Priority.LOW, self.number), owner, mode, ends_at, key)

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.entries, key=lambda each: self.entries[each].rank)))
        entry, job = self.entries[name], self.parts.queue.get(name)
        assert job
        assert self.parts.queue.cancel(job) == entry.state
        if entry.state == State.IN_QUEUE:
            self.ends(name, 499)
        elif entry.state == State.IN_PROGRESS:
            entry.is_cancelled = True

    # -- what the worker does

    @precondition(lambda self: self.of(State.IN_QUEUE))
    @rule(takes_low=st.booleans(), slots=st.integers(1, 8))
    def claim(self, takes_low: bool, slots: int) -> None:
        claimed = self.parts.queue.claim(include_low_priority=takes_low, slots=slots)
        for is_low in (False, True) if takes_low else (False,):
            while name := self.next(is_low, slots):
                entry = self.entries[name]
                if entry.deadline is not None and entry.deadline <= self.clock.now:
                    self.ends(name, 504)
                    continue
                assert claimed and claimed[0].request_id == name
                entry.state, entry.attempt = State.IN_PROGRESS, entry.attempt + 1
                return
        assert claimed is None

    def next(self, is_low: bool, slots: int) -> str | None:
        """The first in the queue's order, those last whose owner has a full share of the slots."""
        running = [(entry.rank[0], entry.owner) for entry in self.entries.values() if entry.state == State.IN_PROGRESS]
        fit = [
            name
            for name in self.of(State.IN_QUEUE)
            if self.entries[name].rank[0] == is_low
            if sum(owner == self.entries[name].owner for _, owner in running) < RUNNING_PER_OWNER
        ]
        owners = {self.entries[name].owner for name in fit} | {owner for low, owner in running if low == is_low}
        return min(
            fit,
            default=None,
            key=lambda name: (
                running.count((is_low, self.entries[name].owner)) * len(owners) >= slots,
                self.entries[name].rank,
            ),
        )

    @precondition(lambda self: self.of(State.IN_PROGRESS))
    @rule(data=st.data(), act=st.sampled_from(["progress", "finish", "give back", "strike", "lose"]))
    def work(self, data: Any, act: str) -> None:
        name = self.chosen(data, State.IN_PROGRESS)
        entry, job = self.entries[name], self.parts.queue.get_cached(name)
        assert job
        if act == "progress":
            self.parts.queue.progress(job, 1, 2)
        elif act == "strike":
            self.parts.queue.record_crash([job])
            entry.strikes += 1
        elif act == "finish":
            assert self.parts.queue.finish(job, painted()) == (not entry.is_cancelled)
            self.ends(name, 499 if entry.is_cancelled else 200)
        elif act == "lose":
            self.parts.queue.requeue_or_fail(job)
            self.is_lost(name)
        else:
            self.parts.queue.release(job)
            self.goes_back(name)

    # -- what time does

    @precondition(lambda self: self.entries)
    @rule(seconds=st.sampled_from(JUMPS))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.entries)
    @rule()
    def expire(self) -> None:
        late = [
            name
            for name in self.of(State.IN_QUEUE)
            if (deadline := self.entries[name].deadline) is not None and deadline <= self.clock.now
        ]
        assert self.parts.queue.fail_expired() == len(late)
        for name in late:
            self.ends(name, 504)

    @precondition(lambda self: self.entries)
    @rule()
    def sweep(self) -> None:
        old = [name for name in self.of(State.COMPLETED) if self.entries[name].finished_at <= self.clock.now - MAX_AGE]
        assert self.retention.sweep() == len(old)
        for name in old:
            del self.entries[name]

    @precondition(lambda self: self.entries)
    @rule()
    def die_and_start_again(self) -> None:
        """As after kill -9: what is in memory is lost, what was committed is not."""
        self.stack.close()
        self.start()
        for name, entry in self.entries.items():
            if entry.state == State.COMPLETED:
                continue
            if entry.mode != Mode.QUEUE:
                self.ends(name, 499)
            elif entry.state == State.IN_PROGRESS or entry.strikes >= MAX_CRASHES:
                self.is_lost(name)
        assert self.parts.queue.recover() == len(self.of(State.IN_QUEUE))

    # -- what always holds

    @invariant()
    def both_say_the_same(self) -> None:
        rows = self.parts.rows("SELECT request_id, state, attempt, strikes, status FROM jobs")
        expected = {
            (name, entry.state, entry.attempt, entry.strikes, entry.status) for name, entry in self.entries.items()
        }
        assert set(rows) == expected
        assert self.parts.queue.length == len(self.of(State.IN_QUEUE))
        for place, name in enumerate(self.of(State.IN_QUEUE)):
            job = self.parts.queue.get_cached(name)
            assert job and self.parts.queue.position(job) == place
        for name, entry in self.entries.items():
            job = self.parts.queue.get(name)
            assert job and (job.state, job.attempt) == (entry.state, entry.attempt)


def compared(max_examples: int, steps: int) -> None:
    """So many lives of a queue, of so many acts each."""
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    options = settings(
        max_examples=max_examples, stateful_step_count=steps, deadline=None, database=None, suppress_health_check=checks
    )
    run_state_machine_as_test(QueueBesideModel, settings=options)


def test_the_queue_does_what_its_model_does() -> None:
    compared(100, 30)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_for_long() -> None:
    compared(3_000, 40)
