"""Tests of how the process ends when a step hangs or the device is lost, and of what happens to the jobs."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from server.auth import ANONYMOUS
from server.errors import DiskFull
from server.queue.jobs import Job
from server.worker.watchdog import EXIT_STUCK, Watchdog
from tests.reliability.test_kill import client_of, rows, submit
from tests.support.components import Clock, Components, claim_job, open_components, submission
from tests.support.fake_models import NullModel, SharingEngine
from tests.support.server_process import TEST_MODELS, Gate, Server, serving, wait_until_completed
from tests.unit.worker.test_worker import ready_worker, worker_of

#: Queries of the jobs in order of arrival: their ids, and their states with their crash counts.
IDS = "SELECT request_id FROM jobs ORDER BY sequence"
STATES_AND_CRASHES = "SELECT state, status, strikes FROM jobs ORDER BY sequence"


@pytest.fixture
def late() -> list[list[Job]]:
    """Return the list that collects the jobs reported as late."""
    return []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watchdog(late: list[list[Job]], clock: Clock) -> Watchdog:
    """Return a watchdog with a step deadline of ten seconds."""
    return Watchdog(10, lambda jobs: late.append(list(jobs)), clock)


# -- checking


def test_nothing_is_late_while_no_step_runs(watchdog: Watchdog, clock: Clock, late: list[list[Job]]) -> None:
    clock.now += 1000
    watchdog.check()
    assert late == []


def test_a_step_is_late_past_the_deadline(
    components: Components, watchdog: Watchdog, clock: Clock, late: list[list[Job]]
) -> None:
    job = claim_job(components)
    with watchdog.watch([job]):
        clock.now += 10
        watchdog.check()
        assert late == []
        clock.now += 0.1
        watchdog.check()
    assert late == [[job]]


def test_each_step_has_a_separate_deadline(
    components: Components, watchdog: Watchdog, clock: Clock, late: list[list[Job]]
) -> None:
    job = claim_job(components)
    for _ in range(5):
        with watchdog.watch([job]):
            clock.now += 9
            watchdog.check()
    clock.now += 100
    watchdog.check()
    assert late == []


def test_an_error_also_ends_the_watch(
    components: Components, watchdog: Watchdog, clock: Clock, late: list[list[Job]]
) -> None:
    with pytest.raises(OSError), watchdog.watch([claim_job(components)]):
        raise OSError
    clock.now += 100
    watchdog.check()
    assert late == []


def test_only_the_jobs_of_the_late_thread_are_reported(
    components: Components, watchdog: Watchdog, clock: Clock, late: list[list[Job]]
) -> None:
    slow, quick = claim_job(components), claim_job(components)
    started, may_finish = threading.Event(), threading.Event()

    def work_slowly() -> None:
        with watchdog.watch([slow]):
            started.set()
            may_finish.wait(60)

    thread = threading.Thread(target=work_slowly)
    thread.start()
    assert started.wait(60)
    clock.now += 9
    with watchdog.watch([quick]):
        clock.now += 2
        watchdog.check()
    may_finish.set()
    thread.join()
    watchdog.check()
    assert late == [[slow]]


def test_after_a_nested_watch_the_outer_watch_continues(
    components: Components, watchdog: Watchdog, clock: Clock, late: list[list[Job]]
) -> None:
    outer, inner = claim_job(components), claim_job(components)
    with watchdog.watch([outer]):
        clock.now += 9
        with watchdog.watch([inner]):
            clock.now += 2
            watchdog.check()
        assert late == []
        watchdog.check()
    assert late == [[outer]]
    clock.now += 100
    watchdog.check()
    assert late == [[outer]]


# -- whose crash count rises


class BatchRecordingEngine(SharingEngine):
    """An engine that records the size of each batch."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        self.batch_sizes.append(1 + len(others))
        return super().advance(task, others)


def test_a_job_with_a_crash_runs_alone(tmp_path: Path) -> None:
    engine = BatchRecordingEngine()
    with open_components(tmp_path) as components:
        for _ in range(3):
            claim_job(components, fields={"num_inference_steps": 1})
        crashed = components.queue.get_cached(components.rows(IDS)[1][0])
        assert crashed
        components.queue.record_crash([crashed])
    with open_components(tmp_path) as components:
        components.queue.recover()
        worker = ready_worker(components, NullModel("test/null", lambda: engine))
        while worker.run_once():
            continue
        assert components.rows("SELECT status, strikes FROM jobs ORDER BY sequence") == [(200, 0), (200, 1), (200, 0)]
    assert engine.batch_sizes == [2, 1]


@pytest.mark.parametrize("is_full", [False, True])
def test_the_process_ends_even_when_the_crash_cannot_be_recorded(
    components: Components, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    aborts: list[tuple[float, list[Job]]] = []
    monkeypatch.setattr(
        "server.worker.worker.abort_process", lambda deadline, jobs: aborts.append((deadline, list(jobs)))
    )
    worker, job = worker_of(components, step_deadline=7), claim_job(components)
    if is_full:
        monkeypatch.setattr(components.queue, "record_crash", lambda jobs: (_ for _ in ()).throw(DiskFull()))
        with pytest.raises(DiskFull):
            worker._on_step_timeout([job])
    else:
        worker._on_step_timeout([job])
    assert aborts == [(7, [job])]
    assert components.rows("SELECT strikes FROM jobs") == [(0 if is_full else 1,)]


# -- the process


def exit_code(server: Server) -> int:
    """Wait until a server exits without being stopped; return its exit code."""
    code = server.process.wait(60)
    server.reader.join()
    return code


def test_a_step_that_hangs_ends_the_process_and_the_next_process_finishes_the_job(tmp_path: Path, gate: Gate) -> None:
    data_dir = tmp_path / "data"
    request = {"prompt": str(gate.path), "num_inference_steps": 3}
    with serving(data_dir, TEST_MODELS, step_deadline="1") as first, client_of(first) as client:
        path = submit(client, request, "test/gate")
        assert exit_code(first) == EXIT_STUCK == 3
        request_id = path.split("/")[-2]
        assert f"a step of {request_id} took longer than --step-deadline (1 s)" in first.output
        # The stack trace shows where the step hangs.
        assert "in advance" in first.output
    assert rows(data_dir, STATES_AND_CRASHES) == [("IN_PROGRESS", None, 1)]
    gate.release(3)
    with serving(data_dir, TEST_MODELS, step_deadline="1") as second, client_of(second) as client:
        assert wait_until_completed(client, path).get("error") is None
        assert second.stop() == 0
    assert rows(data_dir, STATES_AND_CRASHES) == [("COMPLETED", 200, 1)]


def test_after_three_crashes_a_job_fails_and_others_finish(tmp_path: Path, gate: Gate) -> None:
    data_dir = tmp_path / "data"
    with open_components(data_dir) as components:
        # All use one engine, so the other jobs may be batched with the step that hangs.
        for prompt in (str(gate.path), "/dev/null", "/dev/null"):
            fields = {"prompt": prompt, "num_inference_steps": 2}
            components.queue.submit(submission("test/gate", owner=ANONYMOUS, fields=fields))
        paths = [f"/queue/test/gate/requests/{name}" for (name,) in components.rows(IDS)]
    for _ in range(3):
        with serving(data_dir, TEST_MODELS, step_deadline="1") as server:
            assert exit_code(server) == EXIT_STUCK
    with serving(data_dir, TEST_MODELS, step_deadline="1") as server, client_of(server) as client:
        errors = [wait_until_completed(client, f"{path}/status").get("error") for path in paths]
        assert errors == ["The server crashed 3 times while it ran this request.", None, None]
        result = client.get(paths[0])
        assert (result.status_code, result.headers["x-fal-error-type"]) == (500, "internal_error")
        assert server.stop() == 0
    # The other jobs shared a batch with the crashing job once. After that, the crashing job ran alone.
    assert rows(data_dir, STATES_AND_CRASHES) == [("COMPLETED", 500, 3), ("COMPLETED", 200, 1), ("COMPLETED", 200, 1)]


def test_a_lost_device_ends_the_process_and_the_next_process_finishes_the_job(tmp_path: Path) -> None:
    data_dir, fault = tmp_path / "data", tmp_path / "fault"
    fault.touch()
    with serving(data_dir, TEST_MODELS) as first, client_of(first) as client:
        path = submit(client, {"prompt": str(fault), "num_inference_steps": 3}, "test/lost")
        assert exit_code(first) == 1
        assert "the worker stopped, so its process ends: an illegal memory access was encountered" in first.output
    assert rows(data_dir, STATES_AND_CRASHES) == [("IN_PROGRESS", None, 1)]
    fault.unlink()
    with serving(data_dir, TEST_MODELS) as second, client_of(second) as client:
        assert wait_until_completed(client, path).get("error") is None
        assert second.stop() == 0
    assert rows(data_dir, STATES_AND_CRASHES) == [("COMPLETED", 200, 1)]
