"""Who takes the next step: the worker's own turns, with engines whose work is counted."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from models.base import NO_INPUTS
from server.jobs import Job, Priority, State
from server.worker import Worker
from tests.null_model import NullModel, NullPainting, SharingEngine
from tests.parts import Parts
from tests.test_worker import answer, ready, submitted, worked_off


class CostlyPainting(NullPainting):
    """A step costs as much as the picture is large."""

    @property
    def work(self) -> float:
        size = self.request.image_size
        return float(self.step * size.width * size.height)


class CostlyEngine(SharingEngine):
    """Remembers what it began, and takes along up to two that are of the same size."""

    def __init__(self) -> None:
        self.begun: list[NullPainting] = []

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullPainting:
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
        assert worker.turn(), "there is nothing left to do"


def many(parts: Parts, number: int, **fields: Any) -> list[Job]:
    """Requests that are all alike, and long."""
    return [submitted(parts, **{"num_inference_steps": 50, **fields}) for _ in range(number)]


def steps(*jobs: Job) -> int:
    """How many these have taken."""
    return sum(job.step for job in jobs)


# -- a short one behind long ones


@pytest.mark.parametrize("owner", ["me", "you"])
@pytest.mark.parametrize("taken", [4, 60])
def test_a_short_request_behind_long_ones_is_through_soon(parts: Parts, owner: str, taken: int) -> None:
    worker, long = ready(parts), many(parts, 4)
    until(worker, lambda: steps(*long) == taken and min(job.step for job in long) > 0)
    short = submitted(parts, owner=owner, num_inference_steps=4)
    worker.turn()
    assert short.step == 1
    until(worker, lambda: short.state == State.COMPLETED)
    assert steps(*long) - taken < 0.1 * 4 * 50


def test_a_small_picture_does_not_wait_for_a_large_one(parts: Parts) -> None:
    worker = ready(parts, NullModel("test/null", AloneEngine))
    large = submitted(parts, num_inference_steps=50, image_size={"width": 1024, "height": 1024})
    until(worker, lambda: large.step == 5)
    small = submitted(parts, owner="you", num_inference_steps=16)
    until(worker, lambda: small.state == State.COMPLETED)
    # Sixteen small steps are a sixteenth of a large one.
    assert large.step <= 6


# -- keys


def test_two_keys_get_half_each_however_many_requests_they_have(parts: Parts) -> None:
    worker = ready(parts)
    (one,), seven = many(parts, 1, owner="alice"), many(parts, 7, owner="bob")
    until(worker, lambda: steps(one, *seven) == 80)
    assert abs(one.step - 40) <= 1
    assert max(job.step for job in seven) - min(job.step for job in seven) <= 1


def test_keys_share_the_work_and_not_the_steps(parts: Parts) -> None:
    worker = ready(parts, NullModel("test/null", AloneEngine))
    (large,) = many(parts, 1, owner="alice", image_size={"width": 128, "height": 128})
    (small,) = many(parts, 1, owner="bob", image_size={"width": 64, "height": 64})
    until(worker, lambda: small.step == 48)
    assert abs(large.step - 12) <= 1


def test_a_key_that_comes_late_is_owed_nothing(parts: Parts) -> None:
    worker, alices = ready(parts), many(parts, 2, owner="alice")
    until(worker, lambda: steps(*alices) == 60)
    bobs = many(parts, 2, owner="bob")
    until(worker, lambda: steps(*bobs) == 10)
    assert abs(steps(*alices) - 70) <= 1


def test_a_key_that_was_idle_is_owed_nothing(parts: Parts) -> None:
    worker, alices = ready(parts), many(parts, 2, owner="alice")
    first = submitted(parts, owner="bob", num_inference_steps=2)
    until(worker, lambda: first.state == State.COMPLETED)
    before = steps(*alices)
    until(worker, lambda: steps(*alices) == before + 40)
    again = many(parts, 2, owner="bob")
    until(worker, lambda: steps(*again) == 10)
    assert abs(steps(*alices) - before - 50) <= 1


def test_a_key_that_had_the_machine_to_itself_is_not_punished(parts: Parts) -> None:
    worker = ready(parts)
    early = submitted(parts, owner="bob", num_inference_steps=50)
    until(worker, lambda: early.state == State.COMPLETED)
    alices = many(parts, 2, owner="alice")
    until(worker, lambda: steps(*alices) == 10)
    bobs = many(parts, 2, owner="bob")
    until(worker, lambda: steps(*bobs) == 10)
    assert abs(steps(*alices) - 20) <= 1


def test_one_request_after_the_other_is_no_way_around(parts: Parts) -> None:
    worker, (alices,) = ready(parts), many(parts, 1, owner="alice")
    bobs: list[Job] = []
    for _ in range(5):
        bobs.append(submitted(parts, owner="bob", num_inference_steps=4))
        until(worker, lambda: bobs[-1].state == State.COMPLETED)
    # What it had more than its half is remembered over the end of each request.
    assert abs(alices.step - steps(*bobs)) <= 4


def test_who_had_more_than_its_share_waits_also_with_its_next_request(parts: Parts) -> None:
    worker = ready(parts, NullModel("test/null", AloneEngine))
    (alices,) = many(parts, 1, owner="alice")
    large: dict[str, Any] = {"owner": "bob", "num_inference_steps": 1, "image_size": {"width": 256, "height": 256}}
    first = submitted(parts, **large)
    until(worker, lambda: first.state == State.COMPLETED)
    assert alices.step == 1
    second = submitted(parts, **large)
    until(worker, lambda: second.step == 1)
    # As much as bob's first step had cost.
    assert alices.step == 16


# -- ageing


@pytest.mark.parametrize("max_running", [2, 4, 8])
def test_short_ones_without_end_do_not_starve_a_long_one(parts: Parts, max_running: int) -> None:
    worker, short = ready(parts, max_running=max_running), list[Job]()
    long = submitted(parts, num_inference_steps=12)
    while long.state != State.COMPLETED:
        while parts.queue.length < max_running:
            short.append(submitted(parts, num_inference_steps=4))
        assert worker.turn()
    others = steps(*short)
    # Its share of all steps is 1 / (2 * max_running), and the short ones had the rest: they go first.
    assert others + 12 <= 12 * 2 * max_running + 4
    assert others > 12 * max_running


# -- priority


def test_low_priority_waits_until_nothing_else_can_be_stepped(parts: Parts) -> None:
    worker = ready(parts)
    low = submitted(parts, num_inference_steps=5, priority=Priority.LOW)
    worker.turn()
    normal = many(parts, 2, num_inference_steps=20)
    until(worker, lambda: {job.state for job in normal} == {State.COMPLETED})
    assert (low.state, low.step) == (State.IN_PROGRESS, 1)
    worked_off(worker)
    assert answer(parts, low)[0].status == 200


def test_low_priority_takes_no_room_from_normal(parts: Parts) -> None:
    worker = ready(parts, max_running=2)
    low = [submitted(parts, priority=Priority.LOW) for _ in range(3)]
    worker.turn()
    assert [job.state for job in low] == [State.IN_PROGRESS, State.IN_PROGRESS, State.IN_QUEUE]
    normal = many(parts, 3, num_inference_steps=3)
    worker.turn()
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
    until(worker, lambda: steps(bobs, carols) == 10)
    assert abs(alices.step - 25) <= 1


def test_low_priority_is_not_taken_along(parts: Parts) -> None:
    worker = ready(parts, NullModel("test/null", CostlyEngine))
    normal, low = submitted(parts), submitted(parts, priority=Priority.LOW)
    worker.turn()
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
    (one,) = many(parts, 1, owner="alice", priority=Priority.LOW)
    three = many(parts, 3, owner="bob", priority=Priority.LOW)
    until(worker, lambda: steps(one, *three) == 40)
    assert abs(one.step - 20) <= 1


# -- those who go first


def test_a_picture_is_decoded_before_anybody_is_stepped(parts: Parts) -> None:
    worker = ready(parts)
    painted = submitted(parts, num_inference_steps=1, num_images=2)
    until(worker, lambda: painted.step == 2)
    waiting = submitted(parts, owner="you")
    worker.turn()
    worker.turn()
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
    worker.turn()
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
            worker.turn()
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
    assert worker._ledger.total == sum(painting.work for painting in engine.begun) > 0


def test_engines_are_not_mixed(parts: Parts) -> None:
    one, two = CostlyEngine(), CostlyEngine()
    worker = ready(parts, NullModel("test/null", lambda: one), NullModel("test/gate", lambda: two))
    jobs = [submitted(parts, endpoint) for endpoint in ("test/null", "test/gate")]
    worker.turn()
    assert steps(*jobs) == 1
