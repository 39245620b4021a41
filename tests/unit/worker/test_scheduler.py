"""Tests of which request advances next, with a real worker and engines whose work is counted."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from models.base import NO_INPUTS
from server.queue.jobs import Job, Priority, State
from server.worker.scheduler import AGEING
from server.worker.worker import Worker
from tests.support.components import Components
from tests.support.fake_models import NullModel, NullTask, SharingEngine
from tests.unit.worker.test_worker import outcome_and_body, ready_worker, run_all, submit


class CostlyTask(NullTask):
    """A task whose steps cost one unit of work for each pixel."""

    @property
    def work(self) -> int:
        size = self.request.image_size
        return int(self.step * size.width * size.height)

    @property
    def remaining_work(self) -> int:
        size = self.request.image_size
        return int((self.num_steps - self.step) * size.width * size.height)


class CostlyEngine(SharingEngine):
    """An engine that records its tasks, and that batches up to three tasks of the same size."""

    def __init__(self) -> None:
        self.started: list[NullTask] = []

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullTask:
        self.started.append(CostlyTask(request, seed))
        return self.started[-1]

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        same_size = [other for other in others if other.request.image_size == task.request.image_size]
        return super().advance(task, same_size[:2])


class SingleEngine(CostlyEngine):
    """A CostlyEngine that never batches."""

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        return super().advance(task)


def run_until(worker: Worker, is_reached: Callable[[], bool]) -> None:
    """Call `run_once` until `is_reached` is true."""
    while not is_reached():
        assert worker.run_once(), "the worker has no work left and the condition is still false"


def submit_many(components: Components, number: int, **fields: Any) -> list[Job]:
    """Submit equal requests, of 50 steps unless `fields` says otherwise; return their jobs."""
    return [submit(components, **{"num_inference_steps": 50, **fields}) for _ in range(number)]


def total_steps(*jobs: Job) -> int:
    """Return the sum of the steps that these jobs have taken."""
    return sum(job.step for job in jobs)


# -- least remaining work


def ranks(components: Components, worker: Worker, *jobs: Job) -> list[int]:
    """Run all work; return the rank in which each of these jobs ended."""
    order: list[Job] = []
    while worker.run_once():
        order.extend(job for job in jobs if job.state == State.COMPLETED and job not in order)
    return [order.index(job) for job in jobs]


def test_equal_requests_finish_one_after_the_other(components: Components) -> None:
    worker, jobs = ready_worker(components, NullModel("test/null", SingleEngine)), submit_many(components, 8)
    for number in range(8):
        run_until(worker, lambda job=jobs[number]: job.step == 50)  # type: ignore[misc]
        assert [job.step for job in jobs] == [50] * (number + 1) + [0] * (7 - number)
    assert ranks(components, worker, *jobs) == list(range(8))


@pytest.mark.parametrize("owner", ["me", "you"])
@pytest.mark.parametrize("num_steps", [4, 60])
def test_a_short_request_overtakes_long_ones(components: Components, owner: str, num_steps: int) -> None:
    worker, long = ready_worker(components, NullModel("test/null", SingleEngine)), submit_many(components, 4)
    run_until(worker, lambda: total_steps(*long) == num_steps)
    short = submit(components, owner=owner, num_inference_steps=4)
    run_until(worker, lambda: short.state == State.COMPLETED)
    assert total_steps(*long) == num_steps


def test_a_request_that_is_nearly_done_is_not_overtaken(components: Components) -> None:
    worker, (long,) = ready_worker(components), submit_many(components, 1)
    run_until(worker, lambda: long.step == 47)
    short = submit(components, num_inference_steps=4)
    run_until(worker, lambda: long.step == 50)
    assert short.step == 0


def test_all_images_of_a_request_count_as_remaining(components: Components) -> None:
    worker = ready_worker(components)
    four = submit(components, num_inference_steps=5, num_images=4)
    run_until(worker, lambda: four.step == 4)
    one = submit(components, num_inference_steps=10)
    assert ranks(components, worker, four, one) == [1, 0]


def test_remaining_work_is_compared_and_not_steps(components: Components) -> None:
    worker = ready_worker(components, NullModel("test/null", SingleEngine))
    large = submit(components, num_inference_steps=5, image_size={"width": 1024, "height": 1024})
    run_until(worker, lambda: large.step == 4)
    # One step of the large image costs as much as 256 of the small one.
    small = submit(components, num_inference_steps=50)
    assert ranks(components, worker, large, small) == [1, 0]


# -- keys


def test_two_keys_alternate_request_by_request(components: Components) -> None:
    worker = ready_worker(components, NullModel("test/null", SingleEngine))
    jobs = [job for _ in range(4) for owner in ("alice", "bob") for job in submit_many(components, 1, owner=owner)]
    for number in range(8):
        run_until(worker, lambda job=jobs[number]: job.step == 50)  # type: ignore[misc]
        assert [job.step for job in jobs] == [50] * (number + 1) + [0] * (7 - number)


def test_two_keys_get_half_each_for_any_number_of_requests(components: Components) -> None:
    worker, fields = ready_worker(components), {"num_inference_steps": 5}
    two, six = submit_many(components, 2, owner="alice", **fields), submit_many(components, 6, owner="bob", **fields)
    run_until(worker, lambda: total_steps(*two) == 10)
    assert abs(total_steps(*six) - 10) <= 5


def test_keys_share_the_work_and_not_the_steps(components: Components) -> None:
    worker = ready_worker(components, NullModel("test/null", SingleEngine))
    large = submit_many(components, 4, owner="alice", num_inference_steps=2, image_size={"width": 128, "height": 128})
    small = submit_many(components, 4, owner="bob", num_inference_steps=8, image_size={"width": 64, "height": 64})
    run_until(worker, lambda: total_steps(*small) == 32)
    # Eight small steps cost as much as two large ones.
    assert abs(total_steps(*large) - 8) <= 2


def test_a_key_with_long_requests_gets_its_half(components: Components) -> None:
    worker, (long,) = ready_worker(components, max_running=4), submit_many(components, 1, owner="alice")
    short: list[Job] = []
    while long.state != State.COMPLETED:
        while components.queue.length < 4:
            short.append(submit(components, owner="bob", num_inference_steps=5))
        assert worker.run_once()
    # Bob gets at most as much as Alice, plus one request.
    assert total_steps(*short) <= 50 + 5


def test_a_key_that_starts_late_gets_no_credit(components: Components) -> None:
    worker, alice_jobs = ready_worker(components), submit_many(components, 3, owner="alice")
    run_until(worker, lambda: total_steps(*alice_jobs) == 60)
    bob_jobs = submit_many(components, 2, owner="bob")
    run_until(worker, lambda: total_steps(*bob_jobs) == 50)
    # Alice's running request finishes first, at 100 steps in total. Bob starts level with her 60.
    assert total_steps(*alice_jobs) == 100


def test_a_key_that_was_idle_gets_no_credit(components: Components) -> None:
    worker, alice_jobs = ready_worker(components), submit_many(components, 4, owner="alice", num_inference_steps=10)
    bob_job = submit(components, owner="bob", num_inference_steps=2)
    run_until(worker, lambda: bob_job.state == State.COMPLETED)
    run_until(worker, lambda: total_steps(*alice_jobs) == 20)
    bob_jobs = submit_many(components, 2, owner="bob", num_inference_steps=10)
    run_until(worker, lambda: total_steps(*bob_jobs) == 20)
    assert total_steps(*alice_jobs) in (30, 40)


def test_a_key_that_ran_alone_is_not_penalised(components: Components) -> None:
    worker = ready_worker(components)
    early = submit(components, owner="bob", num_inference_steps=50)
    run_until(worker, lambda: early.state == State.COMPLETED)
    alice_jobs = submit_many(components, 4, owner="alice", num_inference_steps=10)
    run_until(worker, lambda: total_steps(*alice_jobs) == 10)
    bob_jobs = submit_many(components, 2, owner="bob", num_inference_steps=10)
    run_until(worker, lambda: total_steps(*bob_jobs) == 20)
    assert total_steps(*alice_jobs) <= 30


def test_sending_one_request_after_the_other_gains_nothing(components: Components) -> None:
    worker, (alice_job,) = ready_worker(components), submit_many(components, 1, owner="alice", num_inference_steps=20)
    bob_jobs: list[Job] = []
    while alice_job.state != State.COMPLETED:
        bob_jobs.append(submit(components, owner="bob", num_inference_steps=4))
        run_until(worker, lambda: bob_jobs[-1].state == State.COMPLETED)
    # The work of a key is remembered when its request ends. Bob gets at most as much as Alice, plus one request.
    assert total_steps(*bob_jobs) <= 20 + 4


@pytest.mark.parametrize("num_steps", [3, 25, 48])
def test_a_hundred_queued_requests_of_one_key_do_not_delay_another_key(components: Components, num_steps: int) -> None:
    worker, alice_jobs = ready_worker(components, max_running=8), submit_many(components, 100, owner="alice")
    run_until(worker, lambda: total_steps(*alice_jobs) == num_steps)
    before = total_steps(*alice_jobs)
    (bob_job,) = submit_many(components, 1, owner="bob")
    run_until(worker, lambda: bob_job.step == 50)
    # At most twice the time of the request, plus the rest of the request that was running.
    assert total_steps(*alice_jobs, bob_job) - before <= 2 * 50 + (50 - num_steps)


def test_a_key_with_its_share_of_the_slots_is_passed_over(components: Components) -> None:
    for owner in ("alice", "alice", "alice", "bob", "alice", "bob", "carol"):
        submit(components, owner=owner)
    found = [components.queue.claim(slots=4) for _ in range(7)]
    # Four slots for three keys: a key with two slots gets no third slot while a key with fewer slots waits.
    assert [job.owner for job, _ in filter(None, found)] == ["alice", "alice", "bob", "bob", "carol", "alice", "alice"]


def test_passing_over_never_puts_low_priority_first(components: Components) -> None:
    for _ in range(3):
        submit(components, owner="alice")
    submit(components, owner="bob", priority=Priority.LOW)
    found = [components.queue.claim(slots=2) for _ in range(4)]
    assert [job.owner for job, _ in filter(None, found)] == ["alice", "alice", "alice", "bob"]


def test_a_position_never_rises_when_others_are_passed_over(components: Components) -> None:
    waiting = submit_many(components, 6, owner="alice")
    waiting += submit_many(components, 2, owner="bob")
    before = {job.request_id: components.queue.position(job) for job in waiting}
    while claimed := components.queue.claim(slots=2):
        after = {job.request_id: components.queue.position(job) for job in waiting if job.state == State.IN_QUEUE}
        assert all(after[name] <= before[name] for name in after)
        assert claimed[0].request_id not in after
        before |= after


# -- ageing


@pytest.mark.parametrize("max_running", [2, 4, 8])
@pytest.mark.parametrize("every", [0, 3, 6], ids=["always", "above full load", "below full load"])
def test_an_endless_stream_of_short_requests_does_not_starve_a_long_one(
    components: Components, max_running: int, every: int
) -> None:
    """A short request of 4 steps arrives every `every` worker steps; with 0, `max_running` requests always wait."""
    worker, short, num_iterations = ready_worker(components, max_running=max_running), list[Job](), 0
    long = submit(components, num_inference_steps=12)
    while long.state != State.COMPLETED:
        while components.queue.length < max_running if every == 0 else len(short) * every < num_iterations:
            short.append(submit(components, num_inference_steps=4))
        assert worker.run_once()
        num_iterations += 1
    # At any load, a short request can overtake only if claimed before AGEING times the difference in work is done.
    assert total_steps(*short) <= AGEING * (12 - 4) + (max_running - 1) * 4
    if every < 4:
        assert total_steps(*short) > AGEING * (12 - 4) / 2


# -- priority


def test_low_priority_waits_until_no_normal_request_can_advance(components: Components) -> None:
    worker = ready_worker(components)
    low = submit(components, num_inference_steps=5, priority=Priority.LOW)
    worker.run_once()
    normal = submit_many(components, 2, num_inference_steps=20)
    run_until(worker, lambda: {job.state for job in normal} == {State.COMPLETED})
    assert (low.state, low.step) == (State.IN_PROGRESS, 1)
    run_all(worker)
    assert outcome_and_body(components, low)[0].status == 200


def test_low_priority_takes_no_slots_from_normal(components: Components) -> None:
    worker = ready_worker(components, max_running=2)
    low = [submit(components, priority=Priority.LOW) for _ in range(3)]
    worker.run_once()
    assert [job.state for job in low] == [State.IN_PROGRESS, State.IN_PROGRESS, State.IN_QUEUE]
    normal = submit_many(components, 3, num_inference_steps=3)
    worker.run_once()
    assert [job.state for job in normal] == [State.IN_PROGRESS, State.IN_PROGRESS, State.IN_QUEUE]
    run_until(worker, lambda: {job.state for job in normal} == {State.COMPLETED})
    assert (total_steps(*low), low[2].state) == (1, State.IN_QUEUE)
    run_all(worker)
    assert {outcome_and_body(components, job)[0].status for job in (*low, *normal)} == {200}


def test_a_waiting_low_priority_request_gives_its_key_no_advantage(components: Components) -> None:
    worker = ready_worker(components)
    waiting = submit(components, owner="carol", priority=Priority.LOW)
    run_until(worker, lambda: waiting.state == State.IN_PROGRESS)
    (alice_job,) = submit_many(components, 1, owner="alice")
    run_until(worker, lambda: alice_job.step == 20)
    (bob_job,), (carol_job,) = submit_many(components, 1, owner="bob"), submit_many(components, 1, owner="carol")
    run_until(worker, lambda: total_steps(bob_job, carol_job) == 100)
    # Carol's waiting low-priority request neither put her ahead of Bob nor delayed Alice.
    assert (alice_job.step, bob_job.sequence < carol_job.sequence) == (50, True)


def test_low_priority_is_not_batched_with_normal(components: Components) -> None:
    worker = ready_worker(components, NullModel("test/null", CostlyEngine))
    normal, low = submit(components), submit(components, priority=Priority.LOW)
    worker.run_once()
    assert (normal.step, low.state, low.step) == (1, State.IN_PROGRESS, 0)


def test_a_key_is_charged_for_batched_steps(components: Components) -> None:
    worker = ready_worker(components, NullModel("test/null", CostlyEngine))
    large, larger = ({"width": side, "height": side} for side in (128, 256))
    shared = [submit(components, owner=owner, num_inference_steps=1) for owner in ("alice", "bob")]
    alice_job = submit(components, owner="alice", image_size=large)
    bob_job = submit(components, owner="bob", image_size=larger)
    run_until(worker, lambda: total_steps(alice_job, bob_job) > 0)
    # Each key was charged one small step, so the older request is next.
    assert ([job.step for job in shared], alice_job.step, bob_job.step) == ([1, 1], 1, 0)


def test_low_priority_requests_of_two_keys_share_fairly(components: Components) -> None:
    worker = ready_worker(components)
    two = submit_many(components, 2, owner="alice", priority=Priority.LOW)
    six = submit_many(components, 6, owner="bob", priority=Priority.LOW)
    run_until(worker, lambda: total_steps(*two) == 100)
    assert total_steps(*six) in (50, 100)


# -- decoding and cancelled requests go first


def test_an_image_is_decoded_before_any_request_advances(components: Components) -> None:
    worker = ready_worker(components)
    decoding = submit(components, num_inference_steps=1, num_images=2)
    run_until(worker, lambda: decoding.step == 2)
    waiting = submit(components, owner="you")
    worker.run_once()
    worker.run_once()
    assert (decoding.state, waiting.step) == (State.COMPLETED, 0)


def test_a_low_priority_image_is_decoded_when_no_normal_request_waits(components: Components) -> None:
    worker = ready_worker(components)
    decoding = submit(components, num_inference_steps=1, priority=Priority.LOW)
    run_until(worker, lambda: decoding.step == 1)
    waiting = submit(components, num_inference_steps=3)
    run_until(worker, lambda: decoding.state == State.COMPLETED)
    assert waiting.state == State.COMPLETED


def test_a_cancelled_request_is_ended_before_any_image_is_decoded(components: Components) -> None:
    worker = ready_worker(components)
    cancelled = submit(components, priority=Priority.LOW)
    run_until(worker, lambda: cancelled.step == 1)
    decoding, waiting = submit(components, num_inference_steps=1), submit(components)
    run_until(worker, lambda: decoding.step == 1)
    components.queue.cancel(cancelled)
    worker.run_once()
    assert (cancelled.state, decoding.state, waiting.step) == (State.COMPLETED, State.IN_PROGRESS, 0)
    assert outcome_and_body(components, cancelled)[0].error_type == "client_cancelled"


# -- random requests


def random_fields(rng: random.Random) -> dict[str, Any]:
    """Return the arguments of a random request."""
    side = rng.choice([64, 128, 192])
    return {
        "owner": rng.choice(["alice", "bob", "carol"]),
        "priority": rng.choice([Priority.NORMAL, Priority.NORMAL, Priority.LOW]),
        "num_inference_steps": rng.randint(1, 12),
        "num_images": rng.randint(1, 3),
        "image_size": {"width": side, "height": side},
    }


@pytest.mark.parametrize("engine_type", [CostlyEngine, SingleEngine])
@pytest.mark.parametrize("seed", range(6))
def test_all_work_is_counted_and_every_request_ends(
    components: Components, seed: int, engine_type: type[CostlyEngine]
) -> None:
    rng, engine, jobs, cancelled = random.Random(seed), engine_type(), list[Job](), list[Job]()
    max_running = rng.randint(1, 4)
    worker = ready_worker(components, NullModel("test/null", lambda: engine), max_running=max_running)
    while len(jobs) < 20:
        jobs.extend(submit(components, **random_fields(rng)) for _ in range(rng.choice([0, 1, 4])))
        for _ in range(rng.choice([1, 5, 20])):
            worker.run_once()
            running = [job for job in jobs if job.state == State.IN_PROGRESS]
            normal = [job for job in running if job.priority == Priority.NORMAL]
            assert len(normal) <= max_running and len(running) <= 2 * max_running
        if running and rng.random() < 0.2:
            cancelled.append(rng.choice(running))
            components.queue.cancel(cancelled[-1])
    run_all(worker)
    assert {job.request_id: outcome_and_body(components, job)[0].status for job in jobs} == {
        job.request_id: 499 if job in cancelled else 200 for job in jobs
    }
    assert worker._scheduler.total == sum(task.work for task in engine.started) > 0


def test_requests_on_different_engines_are_not_batched(components: Components) -> None:
    one, two = CostlyEngine(), CostlyEngine()
    worker = ready_worker(components, NullModel("test/null", lambda: one), NullModel("test/gate", lambda: two))
    jobs = [submit(components, endpoint) for endpoint in ("test/null", "test/gate")]
    worker.run_once()
    assert total_steps(*jobs) == 1
