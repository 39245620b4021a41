"""Who takes the next step: the worker's own turns, with engines whose work is counted."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from models.base import NO_INPUTS
from server.queue.jobs import Job, Priority, State
from server.worker.scheduler import AGEING
from server.worker.worker import Worker
from tests.support.components import Parts
from tests.support.fake_models import NullModel, NullTask, SharingEngine
from tests.unit.worker.test_worker import answer, ready, submitted, worked_off


class CostlyPainting(NullTask):
    """A step costs as much as the picture is large."""

    @property
    def work(self) -> int:
        size = self.request.image_size
        return int(self.step * size.width * size.height)

    @property
    def remaining_work(self) -> int:
        size = self.request.image_size
        return int((self.num_steps - self.step) * size.width * size.height)


class CostlyEngine(SharingEngine):
    """Remembers what it began, and takes along up to two that are of the same size."""

    def __init__(self) -> None:
        self.begun: list[NullTask] = []

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullTask:
        self.begun.append(CostlyPainting(request, seed))
        return self.begun[-1]

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        alike = [other for other in others if other.request.image_size == painting.request.image_size]
        return super().advance(painting, alike[:2])


class AloneEngine(CostlyEngine):
    """The same, one at a time."""

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        return super().advance(painting)


def until(worker: Worker, is_reached: Callable[[], bool]) -> None:
    """Take turns until something is so."""
    while not is_reached():
        assert worker.run_once(), "there is nothing left to do"


def many(parts: Parts, number: int, **fields: Any) -> list[Job]:
    """Requests that are all alike, and long."""
    return [submitted(parts, **{"num_inference_steps": 50, **fields}) for _ in range(number)]


def steps(*jobs: Job) -> int:
    """How many these have taken."""
    return sum(job.step for job in jobs)


# -- least remaining work


def ends(parts: Parts, worker: Worker, *jobs: Job) -> list[int]:
    """The place in which each of these ends, once everybody has."""
    order: list[Job] = []
    while worker.run_once():
        order.extend(job for job in jobs if job.state == State.COMPLETED and job not in order)
    return [order.index(job) for job in jobs]


def test_equal_requests_end_one_after_the_other(parts: Parts) -> None:
    worker, jobs = ready(parts, NullModel("test/null", AloneEngine)), many(parts, 8)
    for number in range(8):
        until(worker, lambda job=jobs[number]: job.step == 50)  # type: ignore[misc]
        assert [job.step for job in jobs] == [50] * (number + 1) + [0] * (7 - number)
    assert ends(parts, worker, *jobs) == list(range(8))


@pytest.mark.parametrize("owner", ["me", "you"])
@pytest.mark.parametrize("taken", [4, 60])
def test_a_short_request_overtakes_long_ones(parts: Parts, owner: str, taken: int) -> None:
    worker, long = ready(parts, NullModel("test/null", AloneEngine)), many(parts, 4)
    until(worker, lambda: steps(*long) == taken)
    short = submitted(parts, owner=owner, num_inference_steps=4)
    until(worker, lambda: short.state == State.COMPLETED)
    assert steps(*long) == taken


def test_one_that_is_nearly_done_is_not_overtaken(parts: Parts) -> None:
    worker, (long,) = ready(parts), many(parts, 1)
    until(worker, lambda: long.step == 47)
    short = submitted(parts, num_inference_steps=4)
    until(worker, lambda: long.step == 50)
    assert short.step == 0


def test_all_images_of_a_request_count_as_remaining(parts: Parts) -> None:
    worker = ready(parts)
    four = submitted(parts, num_inference_steps=5, num_images=4)
    until(worker, lambda: four.step == 4)
    one = submitted(parts, num_inference_steps=10)
    assert ends(parts, worker, four, one) == [1, 0]


def test_work_counts_and_not_steps(parts: Parts) -> None:
    worker = ready(parts, NullModel("test/null", AloneEngine))
    large = submitted(parts, num_inference_steps=5, image_size={"width": 1024, "height": 1024})
    until(worker, lambda: large.step == 4)
    # A step of the large image is 256 of these.
    small = submitted(parts, num_inference_steps=50)
    assert ends(parts, worker, large, small) == [1, 0]


# -- keys


def test_two_keys_alternate_request_by_request(parts: Parts) -> None:
    worker = ready(parts, NullModel("test/null", AloneEngine))
    jobs = [job for _ in range(4) for owner in ("alice", "bob") for job in many(parts, 1, owner=owner)]
    for number in range(8):
        until(worker, lambda job=jobs[number]: job.step == 50)  # type: ignore[misc]
        assert [job.step for job in jobs] == [50] * (number + 1) + [0] * (7 - number)


def test_two_keys_get_half_each_however_many_requests_they_have(parts: Parts) -> None:
    worker, short = ready(parts), {"num_inference_steps": 5}
    two, six = many(parts, 2, owner="alice", **short), many(parts, 6, owner="bob", **short)
    until(worker, lambda: steps(*two) == 10)
    assert abs(steps(*six) - 10) <= 5


def test_keys_share_the_work_and_not_the_steps(parts: Parts) -> None:
    worker = ready(parts, NullModel("test/null", AloneEngine))
    large = many(parts, 4, owner="alice", num_inference_steps=2, image_size={"width": 128, "height": 128})
    small = many(parts, 4, owner="bob", num_inference_steps=8, image_size={"width": 64, "height": 64})
    until(worker, lambda: steps(*small) == 32)
    # Eight small steps are two large ones.
    assert abs(steps(*large) - 8) <= 2


def test_a_key_with_long_requests_gets_its_half(parts: Parts) -> None:
    worker, (long,) = ready(parts, max_running=4), many(parts, 1, owner="alice")
    short: list[Job] = []
    while long.state != State.COMPLETED:
        while parts.queue.length < 4:
            short.append(submitted(parts, owner="bob", num_inference_steps=5))
        assert worker.run_once()
    # bob goes first by at most alice's request, and is never ahead by more.
    assert steps(*short) <= 50 + 5


def test_a_key_that_comes_late_is_owed_nothing(parts: Parts) -> None:
    worker, alices = ready(parts), many(parts, 3, owner="alice")
    until(worker, lambda: steps(*alices) == 60)
    bobs = many(parts, 2, owner="bob")
    until(worker, lambda: steps(*bobs) == 50)
    # alice's request that runs is finished first: she then had 100, and bob begins at 60.
    assert steps(*alices) == 100


def test_a_key_that_was_idle_is_owed_nothing(parts: Parts) -> None:
    worker, alices = ready(parts), many(parts, 4, owner="alice", num_inference_steps=10)
    first = submitted(parts, owner="bob", num_inference_steps=2)
    until(worker, lambda: first.state == State.COMPLETED)
    until(worker, lambda: steps(*alices) == 20)
    again = many(parts, 2, owner="bob", num_inference_steps=10)
    until(worker, lambda: steps(*again) == 20)
    assert steps(*alices) in (30, 40)


def test_a_key_that_had_the_machine_to_itself_is_not_punished(parts: Parts) -> None:
    worker = ready(parts)
    early = submitted(parts, owner="bob", num_inference_steps=50)
    until(worker, lambda: early.state == State.COMPLETED)
    alices = many(parts, 4, owner="alice", num_inference_steps=10)
    until(worker, lambda: steps(*alices) == 10)
    bobs = many(parts, 2, owner="bob", num_inference_steps=10)
    until(worker, lambda: steps(*bobs) == 20)
    assert steps(*alices) <= 30


def test_one_request_after_the_other_is_no_way_around(parts: Parts) -> None:
    worker, (alices,) = ready(parts), many(parts, 1, owner="alice", num_inference_steps=20)
    bobs: list[Job] = []
    while alices.state != State.COMPLETED:
        bobs.append(submitted(parts, owner="bob", num_inference_steps=4))
        until(worker, lambda: bobs[-1].state == State.COMPLETED)
    # What it had is remembered over the end of each request: never more than alice's, and the one that runs.
    assert steps(*bobs) <= 20 + 4


@pytest.mark.parametrize("taken", [3, 25, 48])
def test_a_key_with_a_hundred_in_the_queue_holds_up_nobodys_first(parts: Parts, taken: int) -> None:
    worker, hundred = ready(parts, max_running=8), many(parts, 100, owner="alice")
    until(worker, lambda: steps(*hundred) == taken)
    before = steps(*hundred)
    (first,) = many(parts, 1, owner="bob")
    until(worker, lambda: first.step == 50)
    # Twice its own time, and what was left of the one that ran.
    assert steps(*hundred, first) - before <= 2 * 50 + (50 - taken)


def test_a_key_that_has_its_share_of_the_slots_is_passed_over(parts: Parts) -> None:
    for owner in ("alice", "alice", "alice", "bob", "alice", "bob", "carol"):
        submitted(parts, owner=owner)
    found = [parts.queue.claim(slots=4) for _ in range(7)]
    # Four slots for three keys: who has two of them waits until nobody with fewer does.
    assert [job.owner for job, _ in filter(None, found)] == ["alice", "alice", "bob", "bob", "carol", "alice", "alice"]


def test_passing_over_never_puts_low_priority_first(parts: Parts) -> None:
    for _ in range(3):
        submitted(parts, owner="alice")
    submitted(parts, owner="bob", priority=Priority.LOW)
    found = [parts.queue.claim(slots=2) for _ in range(4)]
    assert [job.owner for job, _ in filter(None, found)] == ["alice", "alice", "alice", "bob"]


def test_a_position_never_rises_when_others_are_passed_over(parts: Parts) -> None:
    waiting = many(parts, 6, owner="alice")
    waiting += many(parts, 2, owner="bob")
    before = {job.request_id: parts.queue.position(job) for job in waiting}
    while claimed := parts.queue.claim(slots=2):
        after = {job.request_id: parts.queue.position(job) for job in waiting if job.state == State.IN_QUEUE}
        assert all(after[name] <= before[name] for name in after)
        assert claimed[0].request_id not in after
        before |= after


# -- ageing


@pytest.mark.parametrize("max_running", [2, 4, 8])
@pytest.mark.parametrize("every", [0, 3, 6], ids=["always", "above full load", "below full load"])
def test_short_ones_without_end_do_not_starve_a_long_one(parts: Parts, max_running: int, every: int) -> None:
    """`every` so many steps of the worker there is one more short request, of 4 steps; 0: as many as there is room."""
    worker, short, turns = ready(parts, max_running=max_running), list[Job](), 0
    long = submitted(parts, num_inference_steps=12)
    while long.state != State.COMPLETED:
        while parts.queue.length < max_running if every == 0 else len(short) * every < turns:
            short.append(submitted(parts, num_inference_steps=4))
        assert worker.run_once()
        turns += 1
    # Overtaken only by those that were claimed before AGEING times the difference was done, whatever the load.
    assert steps(*short) <= AGEING * (12 - 4) + (max_running - 1) * 4
    if every < 4:
        assert steps(*short) > AGEING * (12 - 4) / 2


# -- priority


def test_low_priority_waits_until_nothing_else_can_be_stepped(parts: Parts) -> None:
    worker = ready(parts)
    low = submitted(parts, num_inference_steps=5, priority=Priority.LOW)
    worker.run_once()
    normal = many(parts, 2, num_inference_steps=20)
    until(worker, lambda: {job.state for job in normal} == {State.COMPLETED})
    assert (low.state, low.step) == (State.IN_PROGRESS, 1)
    worked_off(worker)
    assert answer(parts, low)[0].status == 200


def test_low_priority_takes_no_room_from_normal(parts: Parts) -> None:
    worker = ready(parts, max_running=2)
    low = [submitted(parts, priority=Priority.LOW) for _ in range(3)]
    worker.run_once()
    assert [job.state for job in low] == [State.IN_PROGRESS, State.IN_PROGRESS, State.IN_QUEUE]
    normal = many(parts, 3, num_inference_steps=3)
    worker.run_once()
    assert [job.state for job in normal] == [State.IN_PROGRESS, State.IN_PROGRESS, State.IN_QUEUE]
    until(worker, lambda: {job.state for job in normal} == {State.COMPLETED})
    assert (steps(*low), low[2].state) == (1, State.IN_QUEUE)
    worked_off(worker)
    assert {answer(parts, job)[0].status for job in (*low, *normal)} == {200}


def test_low_priority_that_waits_lends_no_key_an_advantage(parts: Parts) -> None:
    worker = ready(parts)
    waiting = submitted(parts, owner="carol", priority=Priority.LOW)
    until(worker, lambda: waiting.state == State.IN_PROGRESS)
    (alices,) = many(parts, 1, owner="alice")
    until(worker, lambda: alices.step == 20)
    (bobs,), (carols,) = many(parts, 1, owner="bob"), many(parts, 1, owner="carol")
    until(worker, lambda: steps(bobs, carols) == 100)
    # carol's waiting request of low priority had made neither her ahead of bob nor alice late.
    assert (alices.step, bobs.sequence < carols.sequence) == (50, True)


def test_low_priority_is_not_taken_along(parts: Parts) -> None:
    worker = ready(parts, NullModel("test/null", CostlyEngine))
    normal, low = submitted(parts), submitted(parts, priority=Priority.LOW)
    worker.run_once()
    assert (normal.step, low.state, low.step) == (1, State.IN_PROGRESS, 0)


def test_who_is_taken_along_pays_for_it(parts: Parts) -> None:
    worker = ready(parts, NullModel("test/null", CostlyEngine))
    large, larger = ({"width": side, "height": side} for side in (128, 256))
    shared = [submitted(parts, owner=owner, num_inference_steps=1) for owner in ("alice", "bob")]
    alices = submitted(parts, owner="alice", image_size=large)
    bobs = submitted(parts, owner="bob", image_size=larger)
    until(worker, lambda: steps(alices, bobs) > 0)
    # Both keys had one small step, so the older request is next.
    assert ([job.step for job in shared], alices.step, bobs.step) == ([1, 1], 1, 0)


def test_those_of_low_priority_share_too(parts: Parts) -> None:
    worker = ready(parts)
    two = many(parts, 2, owner="alice", priority=Priority.LOW)
    six = many(parts, 6, owner="bob", priority=Priority.LOW)
    until(worker, lambda: steps(*two) == 100)
    assert steps(*six) in (50, 100)


# -- those who go first


def test_a_picture_is_decoded_before_anybody_is_stepped(parts: Parts) -> None:
    worker = ready(parts)
    painted = submitted(parts, num_inference_steps=1, num_images=2)
    until(worker, lambda: painted.step == 2)
    waiting = submitted(parts, owner="you")
    worker.run_once()
    worker.run_once()
    assert (painted.state, waiting.step) == (State.COMPLETED, 0)


def test_a_picture_of_low_priority_is_decoded_when_nobody_else_waits(parts: Parts) -> None:
    worker = ready(parts)
    painted = submitted(parts, num_inference_steps=1, priority=Priority.LOW)
    until(worker, lambda: painted.step == 1)
    waiting = submitted(parts, num_inference_steps=3)
    until(worker, lambda: painted.state == State.COMPLETED)
    assert waiting.state == State.COMPLETED


def test_the_cancelled_is_ended_before_anything_is_painted(parts: Parts) -> None:
    worker = ready(parts)
    cancelled = submitted(parts, priority=Priority.LOW)
    until(worker, lambda: cancelled.step == 1)
    painted, stepped = submitted(parts, num_inference_steps=1), submitted(parts)
    until(worker, lambda: painted.step == 1)
    parts.queue.cancel(cancelled)
    worker.run_once()
    assert (cancelled.state, painted.state, stepped.step) == (State.COMPLETED, State.IN_PROGRESS, 0)
    assert answer(parts, cancelled)[0].error_type == "client_cancelled"


# -- whatever comes


def anything(chance: random.Random) -> dict[str, Any]:
    """A request as nobody would think of it."""
    side = chance.choice([64, 128, 192])
    return {
        "owner": chance.choice(["alice", "bob", "carol"]),
        "priority": chance.choice([Priority.NORMAL, Priority.NORMAL, Priority.LOW]),
        "num_inference_steps": chance.randint(1, 12),
        "num_images": chance.randint(1, 3),
        "image_size": {"width": side, "height": side},
    }


@pytest.mark.parametrize("kind", [CostlyEngine, AloneEngine])
@pytest.mark.parametrize("number", range(6))
def test_all_work_is_counted_and_every_request_ends(parts: Parts, number: int, kind: type[CostlyEngine]) -> None:
    chance, engine, jobs, cancelled = random.Random(number), kind(), list[Job](), list[Job]()
    max_running = chance.randint(1, 4)
    worker = ready(parts, NullModel("test/null", lambda: engine), max_running=max_running)
    while len(jobs) < 20:
        jobs.extend(submitted(parts, **anything(chance)) for _ in range(chance.choice([0, 1, 4])))
        for _ in range(chance.choice([1, 5, 20])):
            worker.run_once()
            running = [job for job in jobs if job.state == State.IN_PROGRESS]
            normal = [job for job in running if job.priority == Priority.NORMAL]
            assert len(normal) <= max_running and len(running) <= 2 * max_running
        if running and chance.random() < 0.2:
            cancelled.append(chance.choice(running))
            parts.queue.cancel(cancelled[-1])
    worked_off(worker)
    assert {job.request_id: answer(parts, job)[0].status for job in jobs} == {
        job.request_id: 499 if job in cancelled else 200 for job in jobs
    }
    assert worker._scheduler.total == sum(painting.work for painting in engine.begun) > 0


def test_engines_are_not_mixed(parts: Parts) -> None:
    one, two = CostlyEngine(), CostlyEngine()
    worker = ready(parts, NullModel("test/null", lambda: one), NullModel("test/gate", lambda: two))
    jobs = [submitted(parts, endpoint) for endpoint in ("test/null", "test/gate")]
    worker.run_once()
    assert steps(*jobs) == 1
