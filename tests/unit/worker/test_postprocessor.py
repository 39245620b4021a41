"""What happens beside the steps: decoding, encoding, writing, and the end of a job, on their own thread."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL.Image import Image

from models.base import DeviceLost, GenerationFailed
from server.errors import DiskFull
from server.queue.jobs import Job, Mode, Outcome, State
from server.storage.file_store import StoredFile
from server.worker.postprocessor import Postprocessor
from server.worker.results import ResultBuilder
from server.worker.watchdog import Watchdog
from server.worker.worker import Worker
from tests.support.components import Parts, claimed, full_disk, opened, painted, submission
from tests.support.fake_models import NullModel, SharingEngine
from tests.unit.worker.test_worker import (
    LONG,
    answer,
    ready,
    stopped,
    submitted,
    told,
    wait_until,
    worked_off,
    worker_of,
)


class WatchedEngine(SharingEngine):
    """Writes down which thread does what; decodes as the prompt says: held until it is let, lost, or nothing."""

    def __init__(self, *, decodes_concurrently: bool = True) -> None:
        self.decodes_concurrently = decodes_concurrently
        self.threads: list[tuple[str, str]] = []
        self.is_decoding, self.may_decode = threading.Event(), threading.Event()

    def note(self, what: str) -> None:
        self.threads.append((what, threading.current_thread().name))

    def on(self, what: str) -> set[str]:
        return {thread for noted, thread in self.threads if noted == what}

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        self.note("step")
        return super().advance(painting, others if painting.request.prompt == "shared" else ())

    def decode(self, painting: Any) -> None:
        self.note("decode")
        self.is_decoding.set()
        if "held" in painting.request.prompt:
            assert self.may_decode.wait(60)
        if "lost" in painting.request.prompt:
            raise DeviceLost("an illegal memory access was encountered")
        if painting.request.prompt == "nothing":
            raise GenerationFailed("The image came out as not-a-number, so none is returned.")
        super().decode(painting)

    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        self.note("judge")
        return super().is_unsafe(pictures)


class WatchedModel(NullModel):
    """Its answers too."""

    def __init__(self, engine: WatchedEngine) -> None:
        super().__init__("test/null", lambda: engine)
        self._watched = engine

    def metadata(self, request: Any, seed: int) -> Mapping[str, Any]:
        self._watched.note("encode")
        return super().metadata(request, seed)


@pytest.fixture
def engine() -> Iterator[WatchedEngine]:
    """One that decodes beside, and that holds up nobody in the end."""
    engine = WatchedEngine()
    yield engine
    engine.may_decode.set()


@contextmanager
def at_work(parts: Parts, engine: WatchedEngine, **settings: Any) -> Iterator[Worker]:
    """A worker on its threads."""
    worker = worker_of(parts, WatchedModel(engine), **settings)
    worker.start()
    try:
        yield worker
    finally:
        engine.may_decode.set()
        worker.stop()
        ended("postprocessor")


def ended(name: str) -> None:
    """Wait for threads of this name."""
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(60)
            assert not thread.is_alive()


def completed(parts: Parts, *jobs: Job) -> list[int]:
    """Wait for these to end; returns how."""
    for job in jobs:
        wait_until(parts, job, lambda job=job: job.state == State.COMPLETED)  # type: ignore[misc]
    return [answer(parts, job)[0].status for job in jobs]


# -- which thread does what


def test_others_are_stepped_while_a_picture_is_decoded(parts: Parts, engine: WatchedEngine) -> None:
    with at_work(parts, engine) as worker:
        held = submitted(parts, prompt="held", num_inference_steps=1)
        assert engine.is_decoding.wait(60)
        # It takes room, so that no more are claimed than may run.
        assert len(worker._postprocessor) == 1
        other = submitted(parts, num_inference_steps=5)
        wait_until(parts, other, lambda: other.step == 5)
        assert (held.state, other.state) == (State.IN_PROGRESS, State.IN_PROGRESS)
        engine.may_decode.set()
        assert completed(parts, held, other) == [200, 200]
    assert (engine.on("step"), engine.on("decode"), engine.on("judge")) == (
        {"worker"},
        {"postprocessor"},
        {"postprocessor"},
    )


def test_an_engine_that_does_not_decode_beside_is_left_to_one_thread(parts: Parts) -> None:
    engine = WatchedEngine(decodes_concurrently=False)
    with at_work(parts, engine):
        assert completed(parts, *(submitted(parts, num_images=2) for _ in range(3))) == [200] * 3
    assert engine.on("step") == engine.on("decode") == engine.on("judge") == {"worker"}


@pytest.mark.parametrize("decodes_concurrently", [True, False])
def test_files_are_made_and_written_beside(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, decodes_concurrently: bool
) -> None:
    engine, save = WatchedEngine(decodes_concurrently=decodes_concurrently), parts.files.create

    def watched(*given: Any) -> StoredFile:
        engine.note("write")
        return save(*given)

    monkeypatch.setattr(parts.files, "create", watched)
    with at_work(parts, engine):
        assert completed(parts, *(submitted(parts, num_images=2) for _ in range(3))) == [200] * 3
    assert engine.on("encode") == engine.on("write") == {"postprocessor"}
    assert len(parts.on_disk()) == 6


def test_one_that_shared_the_last_forward_is_decoded_beside_too(parts: Parts, engine: WatchedEngine) -> None:
    with at_work(parts, engine):
        first = submitted(parts, prompt="held", num_inference_steps=1)
        assert engine.is_decoding.wait(60)
        jobs = [submitted(parts, prompt="shared", num_inference_steps=4) for _ in range(3)]
        # All are stepped, and wait behind the one that is held: else the worker had decoded them.
        for job in jobs:
            wait_until(parts, job, lambda job=job: job.step == 4)  # type: ignore[misc]
        last = submitted(parts, prompt="last", num_inference_steps=1)
        wait_until(parts, last, lambda: last.step == 1)
        engine.may_decode.set()
        assert completed(parts, first, *jobs, last) == [200] * 5
    assert engine.on("decode") == {"postprocessor"}


def test_one_that_shared_the_last_forward_can_be_cancelled(parts: Parts, engine: WatchedEngine) -> None:
    worker = ready(parts, WatchedModel(engine))
    first, second = (submitted(parts, prompt="shared", num_inference_steps=1) for _ in range(2))
    worker.run_once()
    assert (first.state, second.state, second.step) == (State.COMPLETED, State.IN_PROGRESS, 1)
    parts.queue.cancel(second)
    worked_off(worker)
    assert [answer(parts, job)[0].status for job in (first, second)] == [200, 499]


# -- errors


def test_a_picture_that_cannot_be_decoded_fails_alone(parts: Parts, engine: WatchedEngine) -> None:
    with at_work(parts, engine) as worker:
        bad, good = submitted(parts, prompt="nothing"), submitted(parts)
        assert completed(parts, bad, good) == [500, 200]
        assert worker.failure is None
    assert told(parts, bad)[1] == "The image came out as not-a-number, so none is returned."


def test_a_device_that_is_lost_beside_ends_the_worker(parts: Parts, engine: WatchedEngine) -> None:
    with at_work(parts, engine) as worker:
        job = submitted(parts, prompt="lost")
        wait_until(parts, job, lambda: worker.failure is not None)
    assert isinstance(worker.failure, DeviceLost)
    assert parts.rows("SELECT strikes FROM jobs") == [(1,)]
    assert job.state != State.COMPLETED


def test_a_device_that_is_lost_on_the_workers_thread_is_a_strike_too(parts: Parts) -> None:
    worker = ready(parts, WatchedModel(WatchedEngine(decodes_concurrently=False)))
    submitted(parts, prompt="lost", num_inference_steps=1)
    worker.run_once()
    with pytest.raises(DeviceLost):
        worker.run_once()
    assert parts.rows("SELECT strikes, state FROM jobs") == [(1, "IN_PROGRESS")]


def test_what_waits_behind_a_lost_device_is_given_back_at_the_next_start(tmp_path: Path, engine: WatchedEngine) -> None:
    with opened(tmp_path) as parts, at_work(parts, engine) as worker:
        held = submitted(parts, prompt="held", num_inference_steps=1)
        assert engine.is_decoding.wait(60)
        jobs = [submitted(parts, prompt=prompt, num_inference_steps=1) for prompt in ("lost", "behind")]
        wait_until(parts, jobs[1], lambda: jobs[1].step == 1)
        engine.may_decode.set()
        wait_until(parts, held, lambda: worker.failure is not None)
    with opened(tmp_path) as parts:
        assert parts.queue.recover() == 2
        found = parts.rows("SELECT request_id, state, strikes FROM jobs ORDER BY sequence")
        assert found == [
            (held.request_id, "COMPLETED", 0),
            (jobs[0].request_id, "IN_QUEUE", 1),
            (jobs[1].request_id, "IN_QUEUE", 0),
        ]


# -- cancelling


@pytest.mark.parametrize("mode", [Mode.QUEUE, Mode.RUN])
def test_a_cancel_while_the_picture_is_decoded_leaves_nothing(parts: Parts, engine: WatchedEngine, mode: Mode) -> None:
    with at_work(parts, engine):
        job = submitted(parts, prompt="held", mode=mode)
        assert engine.is_decoding.wait(60)
        parts.queue.cancel(job)
        assert job.state == State.IN_PROGRESS
        engine.may_decode.set()
        assert completed(parts, job) == [499]
    assert (parts.on_disk(), parts.rows("SELECT * FROM files")) == ([], [])
    assert job.error_type == ("client_cancelled" if mode == Mode.QUEUE else "client_disconnected")


def test_a_cancelled_one_in_line_is_not_decoded(parts: Parts, engine: WatchedEngine) -> None:
    with at_work(parts, engine):
        held = submitted(parts, prompt="held", num_inference_steps=1)
        assert engine.is_decoding.wait(60)
        job = submitted(parts, num_inference_steps=1)
        wait_until(parts, job, lambda: job.step == 1)
        parts.queue.cancel(job)
        engine.may_decode.set()
        assert completed(parts, held, job) == [200, 499]
    assert [what for what, _ in engine.threads].count("decode") == 1


# -- the disk is full


def test_painting_goes_on_while_a_picture_waits_for_room(
    parts: Parts, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, jobs, is_full = parts.files.create, list[Job](), threading.Event()

    def save_when_others_are_stepped(*given: Any) -> StoredFile:
        engine.note("write")
        if len(jobs) < 2 or jobs[1].step < 5:
            is_full.set()
            raise DiskFull
        return save(*given)

    monkeypatch.setattr(parts.files, "create", save_when_others_are_stepped)
    with at_work(parts, engine):
        jobs.append(submitted(parts))
        assert is_full.wait(60)
        jobs.append(submitted(parts, num_inference_steps=5))
        assert completed(parts, *jobs) == [200, 200]
    noted = [what for what, _ in engine.threads]
    assert (noted.count("step"), noted.count("decode"), noted.count("judge")) == (2 + 5, 2, 2)
    assert noted.count("write") >= 3
    assert [(name,) for name in parts.on_disk()] == parts.rows("SELECT name FROM files ORDER BY name")


def test_an_outcome_that_waits_for_room_is_not_made_again(parts: Parts, engine: WatchedEngine) -> None:
    worker = ready(parts, WatchedModel(engine))
    job = submitted(parts, **LONG)
    worker.run_once()
    with full_disk(parts):
        for _ in range(3):
            with pytest.raises(DiskFull):
                worker.run_once()
        made = parts.on_disk()
    worked_off(worker)
    assert (answer(parts, job)[0].status, parts.on_disk()) == (200, made)
    noted = [what for what, _ in engine.threads]
    assert (noted.count("decode"), noted.count("encode"), len(made)) == (1, 1, 1)


# -- the end


def test_a_stop_lets_what_is_decoded_finish_within_the_grace(parts: Parts, engine: WatchedEngine) -> None:
    with at_work(parts, engine, shutdown_grace=60) as worker:
        jobs = [submitted(parts, prompt=prompt, num_inference_steps=1) for prompt in ("held", "behind")]
        wait_until(parts, jobs[1], lambda: jobs[1].step == 1)
        assert {job.state for job in jobs} == {State.IN_PROGRESS}
        stopped(parts, worker, engine.may_decode.set)
        assert [answer(parts, job)[0].status for job in jobs] == [200, 200]
    assert worker.failure is None


def test_a_stop_does_not_wait_for_what_a_lost_device_holds(parts: Parts, engine: WatchedEngine) -> None:
    with at_work(parts, engine, shutdown_grace=3600) as worker:
        jobs = [submitted(parts, prompt=prompt, num_inference_steps=1) for prompt in ("held, then lost", "behind")]
        wait_until(parts, jobs[1], lambda: jobs[1].step == 1)
        assert engine.is_decoding.wait(60)
        stopped(parts, worker, engine.may_decode.set)
        assert isinstance(worker.failure, DeviceLost)
        assert jobs[1].state == State.IN_QUEUE


class WorstMoment(threading.Event):
    """A bell with somebody who asks to stop right before it is cleared."""

    def __init__(self, stop: Callable[[], None]) -> None:
        super().__init__()
        self.stopper, self.is_asked = threading.Thread(target=stop, daemon=True), threading.Event()

    def clear(self) -> None:
        super().clear()
        if self.stopper.ident is None:
            self.stopper.start()
            self.is_asked.set()
            assert self.wait(60)
            super().clear()

    def stopper_ended(self) -> None:
        """Wait until whoever asked has what it asked for."""
        self.is_asked.wait(60)
        self.stopper.join(60)
        assert not self.stopper.is_alive()


def test_the_worker_hears_a_stop_at_the_worst_moment(parts: Parts) -> None:
    worker = worker_of(parts, shutdown_grace=3600)
    parts.notifier.work_available = bell = WorstMoment(worker.stop)
    job = submitted(parts)
    worker.start()
    bell.stopper_ended()
    assert (worker.failure, answer(parts, job)[0].status) == (None, 200)


def test_the_finisher_hears_a_stop_at_the_worst_moment(parts: Parts) -> None:
    finisher = finisher_of(parts)
    finisher._wake = bell = WorstMoment(lambda: finisher.stop(time.monotonic() + 3600))
    # Woken by one that another turn has ended already.
    bell.set()
    finisher.start()
    bell.stopper_ended()


def test_a_stop_past_the_grace_loses_nothing(tmp_path: Path, engine: WatchedEngine) -> None:
    with opened(tmp_path) as parts:
        with at_work(parts, engine, shutdown_grace=0) as worker:
            jobs = [submitted(parts, prompt=prompt, num_inference_steps=1) for prompt in ("held", "behind")]
            wait_until(parts, jobs[1], lambda: jobs[1].step == 1)
            assert engine.is_decoding.wait(60)
            worker.stop()
            worker._thread.join()
            assert [job.state for job in jobs] == [State.IN_PROGRESS, State.IN_QUEUE]
        # What was at hand ends on the thread that has it, if the process lives that long.
        assert worker.failure is None
        assert [job.state for job in jobs] == [State.COMPLETED, State.IN_QUEUE]
    with opened(tmp_path) as parts:
        assert parts.queue.recover() == 1
        found = parts.queue.claim()
        assert found and (found[0].request_id, found[0].attempt) == (jobs[1].request_id, 2)
        assert parts.rows("SELECT strikes FROM jobs") == [(0,), (0,)]


def test_a_stop_without_grace_lets_a_picture_be_written(
    parts: Parts, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, is_writing, may_write = parts.files.create, threading.Event(), threading.Event()

    def save_when_let(*given: Any) -> StoredFile:
        is_writing.set()
        assert may_write.wait(60)
        return save(*given)

    monkeypatch.setattr(parts.files, "create", save_when_let)
    with at_work(parts, engine, shutdown_grace=0) as worker:
        job = submitted(parts, num_inference_steps=1)
        assert is_writing.wait(60)
        stopped(parts, worker, may_write.set)
        assert answer(parts, job)[0].status == 200


def finisher_of(parts: Parts) -> Postprocessor:
    """One whose thread was not started."""
    answers = ResultBuilder(parts.files, embeds_parameters=True)
    return Postprocessor(parts.queue, answers, parts.notifier, Watchdog(600, print), print)


def test_what_is_in_line_goes_back_to_the_queue(parts: Parts) -> None:
    finisher, jobs = finisher_of(parts), [claimed(parts) for _ in range(2)]
    later = parts.queue.submit(submission())
    for job in jobs:
        finisher.add(job, painted())
    parts.queue.cancel(jobs[1])
    finisher.stop(time.monotonic())
    assert [job.state for job in jobs] == [State.IN_QUEUE, State.COMPLETED]
    assert [parts.queue.position(job) for job in (jobs[0], later)] == [0, 1]


def test_jobs_end_in_the_order_in_which_they_come(parts: Parts) -> None:
    finisher, jobs = finisher_of(parts), [claimed(parts) for _ in range(3)]
    for job in reversed(jobs):
        finisher.add(job, Outcome(200, "{}"))
    assert len(finisher) == 3
    assert finisher.run_once()
    assert [job.state for job in jobs] == [State.IN_PROGRESS, State.IN_PROGRESS, State.COMPLETED]
    assert finisher.run_once() and finisher.run_once()
    assert (finisher.run_once(), len(finisher)) == (False, 0)


def test_room_for_another_wakes_the_worker(parts: Parts) -> None:
    finisher, job = finisher_of(parts), claimed(parts)
    parts.notifier.work_available.clear()
    finisher.add(job, painted())
    finisher.run_once()
    assert parts.notifier.work_available.is_set()
