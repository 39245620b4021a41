"""What ends the process, and what becomes of the jobs: a step that does not end, a device that is lost."""

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
from tests.support.components import Clock, Parts, claimed, opened, submission
from tests.support.fake_models import NullModel, SharingEngine
from tests.support.server_process import TEST_MODELS, Gate, Server, completed, serving
from tests.unit.worker.test_worker import ready, worker_of

#: The jobs in the order of arrival, and how they fared.
IDS = "SELECT request_id FROM jobs ORDER BY sequence"
STRIKES = "SELECT state, status, strikes FROM jobs ORDER BY sequence"


@pytest.fixture
def late() -> list[list[Job]]:
    """The jobs that were told to be late."""
    return []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def dog(late: list[list[Job]], clock: Clock) -> Watchdog:
    """One that lets a step take ten seconds."""
    return Watchdog(10, lambda jobs: late.append(list(jobs)), clock)


# -- looking


def test_nothing_is_late_while_nobody_works(dog: Watchdog, clock: Clock, late: list[list[Job]]) -> None:
    clock.now += 1000
    dog.check()
    assert late == []


def test_a_step_is_late_past_the_deadline(parts: Parts, dog: Watchdog, clock: Clock, late: list[list[Job]]) -> None:
    job = claimed(parts)
    with dog.watch([job]):
        clock.now += 10
        dog.check()
        assert late == []
        clock.now += 0.1
        dog.check()
    assert late == [[job]]


def test_the_next_step_has_a_deadline_of_its_own(
    parts: Parts, dog: Watchdog, clock: Clock, late: list[list[Job]]
) -> None:
    job = claimed(parts)
    for _ in range(5):
        with dog.watch([job]):
            clock.now += 9
            dog.check()
    clock.now += 100
    dog.check()
    assert late == []


def test_an_error_ends_the_watch_too(parts: Parts, dog: Watchdog, clock: Clock, late: list[list[Job]]) -> None:
    with pytest.raises(OSError), dog.watch([claimed(parts)]):
        raise OSError
    clock.now += 100
    dog.check()
    assert late == []


def test_only_the_late_thread_is_told_of(parts: Parts, dog: Watchdog, clock: Clock, late: list[list[Job]]) -> None:
    slow, quick = claimed(parts), claimed(parts)
    is_begun, may_end = threading.Event(), threading.Event()

    def work_slowly() -> None:
        with dog.watch([slow]):
            is_begun.set()
            may_end.wait(60)

    thread = threading.Thread(target=work_slowly)
    thread.start()
    assert is_begun.wait(60)
    clock.now += 9
    with dog.watch([quick]):
        clock.now += 2
        dog.check()
    may_end.set()
    thread.join()
    dog.check()
    assert late == [[slow]]


def test_within_another_the_outer_goes_on_afterwards(
    parts: Parts, dog: Watchdog, clock: Clock, late: list[list[Job]]
) -> None:
    outer, inner = claimed(parts), claimed(parts)
    with dog.watch([outer]):
        clock.now += 9
        with dog.watch([inner]):
            clock.now += 2
            dog.check()
        assert late == []
        dog.check()
    assert late == [[outer]]
    clock.now += 100
    dog.check()
    assert late == [[outer]]


# -- whose strike it is


class SeenEngine(SharingEngine):
    """Remembers who went together."""

    def __init__(self) -> None:
        self.together: list[int] = []

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        self.together.append(1 + len(others))
        return super().advance(painting, others)


def test_who_has_a_strike_goes_alone(tmp_path: Path) -> None:
    engine = SeenEngine()
    with opened(tmp_path) as parts:
        for _ in range(3):
            claimed(parts, fields={"num_inference_steps": 1})
        struck = parts.queue.get_cached(parts.rows(IDS)[1][0])
        assert struck
        parts.queue.record_crash([struck])
    with opened(tmp_path) as parts:
        parts.queue.recover()
        worker = ready(parts, NullModel("test/null", lambda: engine))
        while worker.run_once():
            continue
        assert parts.rows("SELECT status, strikes FROM jobs ORDER BY sequence") == [(200, 0), (200, 1), (200, 0)]
    assert engine.together == [2, 1]


@pytest.mark.parametrize("is_full", [False, True])
def test_the_process_ends_also_when_the_strike_cannot_be_written(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    ends: list[tuple[float, list[Job]]] = []
    monkeypatch.setattr(
        "server.worker.worker.abort_process", lambda deadline, jobs: ends.append((deadline, list(jobs)))
    )
    worker, job = worker_of(parts, step_deadline=7), claimed(parts)
    if is_full:
        monkeypatch.setattr(parts.queue, "record_crash", lambda jobs: (_ for _ in ()).throw(DiskFull()))
        with pytest.raises(DiskFull):
            worker._on_step_timeout([job])
    else:
        worker._on_step_timeout([job])
    assert ends == [(7, [job])]
    assert parts.rows("SELECT strikes FROM jobs") == [(0 if is_full else 1,)]


# -- the process


def exit_code(server: Server) -> int:
    """Wait for a server to end by itself."""
    code = server.process.wait(60)
    server._reader.join()
    return code


def test_a_step_that_does_not_end_ends_the_process_and_the_next_one_paints(tmp_path: Path, gate: Gate) -> None:
    data_dir = tmp_path / "data"
    request = {"prompt": str(gate.path), "num_inference_steps": 3}
    with serving(data_dir, TEST_MODELS, step_deadline="1") as first, client_of(first) as client:
        path = submit(client, request, "test/gate")
        assert exit_code(first) == EXIT_STUCK == 3
        request_id = path.split("/")[-2]
        assert f"a step of {request_id} took longer than --step-deadline (1 s)" in first.output
        # And where it hangs.
        assert "in advance" in first.output
    assert rows(data_dir, STRIKES) == [("IN_PROGRESS", None, 1)]
    gate.let(3)
    with serving(data_dir, TEST_MODELS, step_deadline="1") as second, client_of(second) as client:
        assert completed(client, path).get("error") is None
        assert second.stop() == 0
    assert rows(data_dir, STRIKES) == [("COMPLETED", 200, 1)]


def test_after_three_strikes_a_job_ends_and_others_go_on(tmp_path: Path, gate: Gate) -> None:
    data_dir = tmp_path / "data"
    with opened(data_dir) as parts:
        # All of one engine: those that follow might share the step that hangs.
        for prompt in (str(gate.path), "/dev/null", "/dev/null"):
            fields = {"prompt": prompt, "num_inference_steps": 2}
            parts.queue.submit(submission("test/gate", owner=ANONYMOUS, fields=fields))
        paths = [f"/queue/test/gate/requests/{name}" for (name,) in parts.rows(IDS)]
    for _ in range(3):
        with serving(data_dir, TEST_MODELS, step_deadline="1") as server:
            assert exit_code(server) == EXIT_STUCK
    with serving(data_dir, TEST_MODELS, step_deadline="1") as server, client_of(server) as client:
        errors = [completed(client, f"{path}/status").get("error") for path in paths]
        assert errors == ["The server crashed 3 times while it ran this request.", None, None]
        result = client.get(paths[0])
        assert (result.status_code, result.headers["x-fal-error-type"]) == (500, "internal_error")
        assert server.stop() == 0
    # The others were beside it once; after that it went alone.
    assert rows(data_dir, STRIKES) == [("COMPLETED", 500, 3), ("COMPLETED", 200, 1), ("COMPLETED", 200, 1)]


def test_a_device_that_is_lost_ends_the_process_and_the_next_one_paints(tmp_path: Path) -> None:
    data_dir, fault = tmp_path / "data", tmp_path / "fault"
    fault.touch()
    with serving(data_dir, TEST_MODELS) as first, client_of(first) as client:
        path = submit(client, {"prompt": str(fault), "num_inference_steps": 3}, "test/lost")
        assert exit_code(first) == 1
        assert "the worker stopped: an illegal memory access was encountered" in first.output
    assert rows(data_dir, STRIKES) == [("IN_PROGRESS", None, 1)]
    fault.unlink()
    with serving(data_dir, TEST_MODELS) as second, client_of(second) as client:
        assert completed(client, path).get("error") is None
        assert second.stop() == 0
    assert rows(data_dir, STRIKES) == [("COMPLETED", 200, 1)]
