"""Tests of the work after the steps: decode, encode, store and finish a job, on a separate thread."""

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
from tests.support.components import Components, claim_job, full_disk, open_components, submission, success
from tests.support.fake_models import NullModel, SharingEngine
from tests.unit.worker.test_worker import (
    LONG,
    error_of,
    outcome_and_body,
    ready_worker,
    run_all,
    stop_worker,
    submit,
    wait_until,
    worker_of,
)


class RecordingEngine(SharingEngine):
    """An engine that records which thread takes each action. The prompt controls `decode`.

    "held" waits for `may_decode`, "lost" raises DeviceLost, and "nothing" raises GenerationFailed.
    """

    def __init__(self, *, decodes_concurrently: bool = True) -> None:
        self.decodes_concurrently = decodes_concurrently
        self.threads: list[tuple[str, str]] = []
        self.is_decoding, self.may_decode = threading.Event(), threading.Event()

    def record(self, action: str) -> None:
        self.threads.append((action, threading.current_thread().name))

    def threads_of(self, action: str) -> set[str]:
        return {thread for recorded, thread in self.threads if recorded == action}

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        self.record("step")
        return super().advance(task, others if task.request.prompt == "shared" else ())

    def decode(self, task: Any) -> None:
        self.record("decode")
        self.is_decoding.set()
        if "held" in task.request.prompt:
            assert self.may_decode.wait(60)
        if "lost" in task.request.prompt:
            raise DeviceLost("an illegal memory access was encountered")
        if task.request.prompt == "nothing":
            raise GenerationFailed("The image has values that are not finite, so no image is returned.")
        super().decode(task)

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        self.record("judge")
        return super().is_unsafe(images)


class RecordingModel(NullModel):
    """A model that also records the encoding of results."""

    def __init__(self, engine: RecordingEngine) -> None:
        super().__init__("test/null", lambda: engine)
        self._recording_engine = engine

    def metadata(self, request: Any, seed: int) -> Mapping[str, Any]:
        self._recording_engine.record("encode")
        return super().metadata(request, seed)


@pytest.fixture
def engine() -> Iterator[RecordingEngine]:
    """Yield an engine that decodes concurrently, and release held decodes at the end."""
    engine = RecordingEngine()
    yield engine
    engine.may_decode.set()


@contextmanager
def running_worker(components: Components, engine: RecordingEngine, **settings: Any) -> Iterator[Worker]:
    """Run a worker on its threads while the block runs."""
    worker = worker_of(components, RecordingModel(engine), **settings)
    worker.start()
    try:
        yield worker
    finally:
        engine.may_decode.set()
        worker.stop()
        join_threads("postprocessor")


def join_threads(name: str) -> None:
    """Wait until the threads with this name have ended."""
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(60)
            assert not thread.is_alive()


def final_statuses(components: Components, *jobs: Job) -> list[int]:
    """Wait until these jobs are completed and return their status codes."""
    for job in jobs:
        wait_until(components, job, lambda job=job: job.state == State.COMPLETED)  # type: ignore[misc]
    return [outcome_and_body(components, job)[0].status for job in jobs]


# -- which thread does what


def test_other_jobs_advance_while_an_image_is_decoded(components: Components, engine: RecordingEngine) -> None:
    with running_worker(components, engine) as worker:
        held = submit(components, prompt="held", num_inference_steps=1)
        assert engine.is_decoding.wait(60)
        # A job that is being decoded still counts towards the limit of running jobs.
        assert len(worker._postprocessor) == 1
        other = submit(components, num_inference_steps=5)
        wait_until(components, other, lambda: other.step == 5)
        assert (held.state, other.state) == (State.IN_PROGRESS, State.IN_PROGRESS)
        engine.may_decode.set()
        assert final_statuses(components, held, other) == [200, 200]
    assert (engine.threads_of("step"), engine.threads_of("decode"), engine.threads_of("judge")) == (
        {"worker"},
        {"postprocessor"},
        {"postprocessor"},
    )


def test_an_engine_without_concurrent_decoding_is_used_by_one_thread(components: Components) -> None:
    engine = RecordingEngine(decodes_concurrently=False)
    with running_worker(components, engine):
        assert final_statuses(components, *(submit(components, num_images=2) for _ in range(3))) == [200] * 3
    assert engine.threads_of("step") == engine.threads_of("decode") == engine.threads_of("judge") == {"worker"}


@pytest.mark.parametrize("decodes_concurrently", [True, False])
def test_files_are_encoded_and_written_on_the_postprocessor_thread(
    components: Components, monkeypatch: pytest.MonkeyPatch, decodes_concurrently: bool
) -> None:
    engine, save = RecordingEngine(decodes_concurrently=decodes_concurrently), components.files.create

    def recording_save(*args: Any) -> StoredFile:
        engine.record("write")
        return save(*args)

    monkeypatch.setattr(components.files, "create", recording_save)
    with running_worker(components, engine):
        assert final_statuses(components, *(submit(components, num_images=2) for _ in range(3))) == [200] * 3
    assert engine.threads_of("encode") == engine.threads_of("write") == {"postprocessor"}
    assert len(components.stored_file_names()) == 6


def test_jobs_that_shared_a_batch_are_decoded_on_the_postprocessor_thread(
    components: Components, engine: RecordingEngine
) -> None:
    with running_worker(components, engine):
        first = submit(components, prompt="held", num_inference_steps=1)
        assert engine.is_decoding.wait(60)
        jobs = [submit(components, prompt="shared", num_inference_steps=4) for _ in range(3)]
        # All steps are done, and the jobs wait behind the held job. The worker itself would have decoded them by now.
        for job in jobs:
            wait_until(components, job, lambda job=job: job.step == 4)  # type: ignore[misc]
        last = submit(components, prompt="last", num_inference_steps=1)
        wait_until(components, last, lambda: last.step == 1)
        engine.may_decode.set()
        assert final_statuses(components, first, *jobs, last) == [200] * 5
    assert engine.threads_of("decode") == {"postprocessor"}


def test_a_job_that_shared_the_last_batch_can_be_cancelled(components: Components, engine: RecordingEngine) -> None:
    worker = ready_worker(components, RecordingModel(engine))
    first, second = (submit(components, prompt="shared", num_inference_steps=1) for _ in range(2))
    worker.run_once()
    assert (first.state, second.state, second.step) == (State.COMPLETED, State.IN_PROGRESS, 1)
    components.queue.cancel(second)
    run_all(worker)
    assert [outcome_and_body(components, job)[0].status for job in (first, second)] == [200, 499]


# -- errors


def test_an_image_that_cannot_be_decoded_fails_only_its_job(components: Components, engine: RecordingEngine) -> None:
    with running_worker(components, engine) as worker:
        bad, good = submit(components, prompt="nothing"), submit(components)
        assert final_statuses(components, bad, good) == [500, 200]
        assert worker.failure is None
    assert error_of(components, bad)[1] == "The image has values that are not finite, so no image is returned."


def test_a_device_lost_while_decoding_ends_the_worker(components: Components, engine: RecordingEngine) -> None:
    with running_worker(components, engine) as worker:
        job = submit(components, prompt="lost")
        wait_until(components, job, lambda: worker.failure is not None)
    assert isinstance(worker.failure, DeviceLost)
    assert components.rows("SELECT strikes FROM jobs") == [(1,)]
    assert job.state != State.COMPLETED


def test_a_device_lost_on_the_worker_thread_also_counts_as_a_crash(components: Components) -> None:
    worker = ready_worker(components, RecordingModel(RecordingEngine(decodes_concurrently=False)))
    submit(components, prompt="lost", num_inference_steps=1)
    worker.run_once()
    with pytest.raises(DeviceLost):
        worker.run_once()
    assert components.rows("SELECT strikes, state FROM jobs") == [(1, "IN_PROGRESS")]


def test_jobs_behind_a_lost_device_are_requeued_at_the_next_start(tmp_path: Path, engine: RecordingEngine) -> None:
    with open_components(tmp_path) as components, running_worker(components, engine) as worker:
        held = submit(components, prompt="held", num_inference_steps=1)
        assert engine.is_decoding.wait(60)
        jobs = [submit(components, prompt=prompt, num_inference_steps=1) for prompt in ("lost", "behind")]
        wait_until(components, jobs[1], lambda: jobs[1].step == 1)
        engine.may_decode.set()
        wait_until(components, held, lambda: worker.failure is not None)
    with open_components(tmp_path) as components:
        assert components.queue.recover() == 2
        found = components.rows("SELECT request_id, state, strikes FROM jobs ORDER BY sequence")
        assert found == [
            (held.request_id, "COMPLETED", 0),
            (jobs[0].request_id, "IN_QUEUE", 1),
            (jobs[1].request_id, "IN_QUEUE", 0),
        ]


# -- cancelling


@pytest.mark.parametrize("mode", [Mode.QUEUE, Mode.RUN])
def test_a_cancel_while_the_image_is_decoded_leaves_no_file(
    components: Components, engine: RecordingEngine, mode: Mode
) -> None:
    with running_worker(components, engine):
        job = submit(components, prompt="held", mode=mode)
        assert engine.is_decoding.wait(60)
        components.queue.cancel(job)
        assert job.state == State.IN_PROGRESS
        engine.may_decode.set()
        assert final_statuses(components, job) == [499]
    assert (components.stored_file_names(), components.rows("SELECT * FROM files")) == ([], [])
    assert job.error_type == ("client_cancelled" if mode == Mode.QUEUE else "client_disconnected")


def test_a_waiting_job_that_is_cancelled_is_not_decoded(components: Components, engine: RecordingEngine) -> None:
    with running_worker(components, engine):
        held = submit(components, prompt="held", num_inference_steps=1)
        assert engine.is_decoding.wait(60)
        job = submit(components, num_inference_steps=1)
        wait_until(components, job, lambda: job.step == 1)
        components.queue.cancel(job)
        engine.may_decode.set()
        assert final_statuses(components, held, job) == [200, 499]
    assert [action for action, _ in engine.threads].count("decode") == 1


# -- the disk is full


def test_other_jobs_advance_while_an_image_waits_for_disk_space(
    components: Components, engine: RecordingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, jobs, is_full = components.files.create, list[Job](), threading.Event()

    def save_after_other_steps(*args: Any) -> StoredFile:
        engine.record("write")
        if len(jobs) < 2 or jobs[1].step < 5:
            is_full.set()
            raise DiskFull
        return save(*args)

    monkeypatch.setattr(components.files, "create", save_after_other_steps)
    with running_worker(components, engine):
        jobs.append(submit(components))
        assert is_full.wait(60)
        jobs.append(submit(components, num_inference_steps=5))
        assert final_statuses(components, *jobs) == [200, 200]
    actions = [action for action, _ in engine.threads]
    assert (actions.count("step"), actions.count("decode"), actions.count("judge")) == (2 + 5, 2, 2)
    assert actions.count("write") >= 3
    assert [(name,) for name in components.stored_file_names()] == components.rows(
        "SELECT name FROM files ORDER BY name"
    )


def test_an_outcome_that_waits_for_disk_space_is_not_built_again(
    components: Components, engine: RecordingEngine
) -> None:
    worker = ready_worker(components, RecordingModel(engine))
    job = submit(components, **LONG)
    worker.run_once()
    with full_disk(components):
        for _ in range(3):
            with pytest.raises(DiskFull):
                worker.run_once()
        stored = components.stored_file_names()
    run_all(worker)
    assert (outcome_and_body(components, job)[0].status, components.stored_file_names()) == (200, stored)
    actions = [action for action, _ in engine.threads]
    assert (actions.count("decode"), actions.count("encode"), len(stored)) == (1, 1, 1)


# -- stopping


def test_a_stop_lets_decoding_finish_within_the_grace_period(components: Components, engine: RecordingEngine) -> None:
    with running_worker(components, engine, shutdown_grace=60) as worker:
        jobs = [submit(components, prompt=prompt, num_inference_steps=1) for prompt in ("held", "behind")]
        wait_until(components, jobs[1], lambda: jobs[1].step == 1)
        assert {job.state for job in jobs} == {State.IN_PROGRESS}
        stop_worker(components, worker, engine.may_decode.set)
        assert [outcome_and_body(components, job)[0].status for job in jobs] == [200, 200]
    assert worker.failure is None


def test_a_stop_does_not_wait_for_jobs_on_a_lost_device(components: Components, engine: RecordingEngine) -> None:
    with running_worker(components, engine, shutdown_grace=3600) as worker:
        jobs = [submit(components, prompt=prompt, num_inference_steps=1) for prompt in ("held, then lost", "behind")]
        wait_until(components, jobs[1], lambda: jobs[1].step == 1)
        assert engine.is_decoding.wait(60)
        stop_worker(components, worker, engine.may_decode.set)
        assert isinstance(worker.failure, DeviceLost)
        assert jobs[1].state == State.IN_QUEUE


class StopBeforeClear(threading.Event):
    """An event that is set by a stop right before its first `clear`, so that the `clear` erases the signal."""

    def __init__(self, stop: Callable[[], None]) -> None:
        super().__init__()
        self.stopper, self.is_stopping = threading.Thread(target=stop, daemon=True), threading.Event()

    def clear(self) -> None:
        super().clear()
        if self.stopper.ident is None:
            self.stopper.start()
            self.is_stopping.set()
            assert self.wait(60)
            super().clear()

    def wait_for_stop(self) -> None:
        """Wait until the stop has returned."""
        self.is_stopping.wait(60)
        self.stopper.join(60)
        assert not self.stopper.is_alive()


def test_the_worker_stops_when_the_stop_comes_right_before_a_clear(components: Components) -> None:
    worker = worker_of(components, shutdown_grace=3600)
    components.notifier.work_available = event = StopBeforeClear(worker.stop)
    job = submit(components)
    worker.start()
    event.wait_for_stop()
    assert (worker.failure, outcome_and_body(components, job)[0].status) == (None, 200)


def test_the_postprocessor_stops_when_the_stop_comes_right_before_a_clear(components: Components) -> None:
    postprocessor = postprocessor_of(components)
    postprocessor._wake = event = StopBeforeClear(lambda: postprocessor.stop(time.monotonic() + 3600))
    # Wake the thread although no job waits, as when an earlier pass has already finished the job.
    event.set()
    postprocessor.start()
    event.wait_for_stop()


def test_a_stop_after_the_grace_period_loses_no_job(tmp_path: Path, engine: RecordingEngine) -> None:
    with open_components(tmp_path) as components:
        with running_worker(components, engine, shutdown_grace=0) as worker:
            jobs = [submit(components, prompt=prompt, num_inference_steps=1) for prompt in ("held", "behind")]
            wait_until(components, jobs[1], lambda: jobs[1].step == 1)
            assert engine.is_decoding.wait(60)
            worker.stop()
            worker._thread.join()
            assert [job.state for job in jobs] == [State.IN_PROGRESS, State.IN_QUEUE]
        # The current job finishes on its thread if the process lives long enough.
        assert worker.failure is None
        assert [job.state for job in jobs] == [State.COMPLETED, State.IN_QUEUE]
    with open_components(tmp_path) as components:
        assert components.queue.recover() == 1
        found = components.queue.claim()
        assert found and (found[0].request_id, found[0].attempt) == (jobs[1].request_id, 2)
        assert components.rows("SELECT strikes FROM jobs") == [(0,), (0,)]


def test_a_stop_without_a_grace_period_lets_an_image_be_written(
    components: Components, engine: RecordingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, is_writing, may_write = components.files.create, threading.Event(), threading.Event()

    def save_when_allowed(*args: Any) -> StoredFile:
        is_writing.set()
        assert may_write.wait(60)
        return save(*args)

    monkeypatch.setattr(components.files, "create", save_when_allowed)
    with running_worker(components, engine, shutdown_grace=0) as worker:
        job = submit(components, num_inference_steps=1)
        assert is_writing.wait(60)
        stop_worker(components, worker, may_write.set)
        assert outcome_and_body(components, job)[0].status == 200


def postprocessor_of(components: Components) -> Postprocessor:
    """Return a postprocessor whose thread is not started."""
    results = ResultBuilder(components.files, embeds_parameters=True)
    return Postprocessor(components.queue, results, components.notifier, Watchdog(600, print), print)


def test_a_stop_releases_waiting_jobs_to_the_queue(components: Components) -> None:
    postprocessor, jobs = postprocessor_of(components), [claim_job(components) for _ in range(2)]
    later = components.queue.submit(submission())
    for job in jobs:
        postprocessor.add(job, success())
    components.queue.cancel(jobs[1])
    postprocessor.stop(time.monotonic())
    assert [job.state for job in jobs] == [State.IN_QUEUE, State.COMPLETED]
    assert [components.queue.position(job) for job in (jobs[0], later)] == [0, 1]


def test_jobs_finish_in_order_of_arrival(components: Components) -> None:
    postprocessor, jobs = postprocessor_of(components), [claim_job(components) for _ in range(3)]
    for job in reversed(jobs):
        postprocessor.add(job, Outcome(200, "{}"))
    assert len(postprocessor) == 3
    assert postprocessor.run_once()
    assert [job.state for job in jobs] == [State.IN_PROGRESS, State.IN_PROGRESS, State.COMPLETED]
    assert postprocessor.run_once() and postprocessor.run_once()
    assert (postprocessor.run_once(), len(postprocessor)) == (False, 0)


def test_a_finished_job_wakes_the_worker(components: Components) -> None:
    postprocessor, job = postprocessor_of(components), claim_job(components)
    components.notifier.work_available.clear()
    postprocessor.add(job, success())
    postprocessor.run_once()
    assert components.notifier.work_available.is_set()
