"""Tests of a runner without Ray: it runs the jobs it receives, and reports their progress and results."""

import dataclasses
import io
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from server.cluster import messages, runner
from server.cluster.runner import Runner
from server.queue.jobs import Job, Mode, Priority, State
from server.settings import Settings
from tests.support.server_process import MODELS, Gate

TEXT = (
    '{"prompt": "%s", "seed": 7, "num_inference_steps": 2, "image_size": {"width": 64, "height": 64}, '
    '"num_images": 2, "output_format": "png"}'
)


def job(endpoint: str = "test/null", **changes: Any) -> Job:
    found = Job(1, "one", endpoint, "me", Mode.QUEUE, Priority.NORMAL, "http://here", State.IN_PROGRESS, attempt=1)
    return dataclasses.replace(found, **changes)


@pytest.fixture
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Runner, Iterator[Any]]]:
    """Yield a runner that is running, and an iterator over its messages."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    gpu_runner = Runner(
        Settings(weights=("test/null=demo",), data_dir=tmp_path / "head", models_dir=MODELS, shutdown_grace=5)
    )
    reports = (report for batch in gpu_runner.work() for report in batch)
    try:
        yield gpu_runner, reports
    finally:
        gpu_runner.stop()
        # Read the remaining messages, so that `work` runs to its end.
        list(reports)
        gpu_runner._worker._thread.join()
        gpu_runner._crash_recorder.close()
        root.handlers[:], root.level = handlers, level


def first(reports: Iterator[Any], kind: type[Any]) -> Any:
    return next(report for report in reports if isinstance(report, kind))


def test_a_job_is_run_and_reported(working: tuple[Runner, Iterator[Any]]) -> None:
    gpu_runner, reports = working
    assert next(report for report in reports if isinstance(report, messages.RunnerState) and report.is_ready).engines
    gpu_runner.take_job(job(), TEXT % "x", {})
    earlier = []
    while not isinstance(report := next(reports), messages.JobFinished):
        earlier.append(report)
    steps = [(each.step, each.num_steps) for each in earlier if isinstance(each, messages.JobProgress)]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sum(isinstance(each, messages.StepMeasured) for each in earlier) == 4
    assert [each for each in earlier if isinstance(each, messages.ImagesGenerated)] == [
        messages.ImagesGenerated("test/null", 2, 0)
    ]
    assert report.outcome.status == 200
    assert [file.name for file in report.outcome.files] == list(report.contents)
    colours = [Image.open(io.BytesIO(content)).getpixel((0, 0)) for content in report.contents.values()]
    assert len(set(colours)) == 2


def test_a_cancelled_job_ends_before_its_next_step(working: tuple[Runner, Iterator[Any]], gate: Gate) -> None:
    gpu_runner, reports = working
    gpu_runner.take_job(job("test/gate"), TEXT % gate.path, {})
    gate.release(1)
    assert first(reports, messages.JobProgress).step == 1
    gpu_runner.cancel("one")
    gate.release(1)
    ended = first(reports, messages.JobFinished)
    assert (ended.outcome.error_type, ended.contents) == ("client_cancelled", {})


def test_previews_are_sent_on_request(working: tuple[Runner, Iterator[Any]], gate: Gate) -> None:
    gpu_runner, reports = working
    gpu_runner.take_job(job("test/gate"), TEXT % gate.path, {})
    gate.release(1)
    assert first(reports, messages.JobProgress).preview is None
    gpu_runner.preview("one")
    gate.release_all()
    assert any(report.preview for report in iter(lambda: first(reports, messages.JobProgress), None) if report.step > 1)
    assert first(reports, messages.JobFinished)


def test_input_files_are_stored(working: tuple[Runner, Iterator[Any]]) -> None:
    gpu_runner, reports = working
    content = io.BytesIO()
    Image.new("RGB", (64, 64), (1, 2, 250)).save(content, "PNG")
    text = '{"prompt": "x", "seed": 7, "num_inference_steps": 10, "image_url": "x", "image_size": "square"}'
    temp_path = gpu_runner._inputs.temp_path()
    temp_path.write_bytes(content.getvalue())
    name = gpu_runner._inputs.add(temp_path, ".png")
    gpu_runner._inputs.path(name).unlink()
    gpu_runner.take_job(job("test/copy", input_files={"image_url": name}), text, {name: content.getvalue()})
    (image,) = first(reports, messages.JobFinished).contents.values()
    red, green, blue = Image.open(io.BytesIO(image)).convert("RGB").getpixel((0, 0))  # type: ignore[misc]
    assert blue > 200 > 20 > max(red, green)


def test_a_job_whose_input_cannot_be_stored_is_rejected(
    working: tuple[Runner, Iterator[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_runner, reports = working
    monkeypatch.setattr(gpu_runner, "fetch", lambda source: (_ for _ in ()).throw(OSError("no space left")))
    assert gpu_runner.missing_inputs(["a.png"]) == ["a.png"]
    gpu_runner.take_job(job("test/copy", input_files={"image_url": "a.png"}), TEXT % "x", {"a.png": b""})
    assert first(reports, messages.JobRejected) == messages.JobRejected("one")


def test_running_jobs_are_released_after_the_grace_period(
    working: tuple[Runner, Iterator[Any]], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_runner, reports = working
    object.__setattr__(gpu_runner._worker._settings, "shutdown_grace", 0)
    gpu_runner.take_job(job("test/gate"), TEXT % gate.path, {})
    gate.release(1)
    assert first(reports, messages.JobProgress).step == 1
    stopping = threading.Thread(target=gpu_runner.stop)
    stopping.start()
    gate.release(1)
    assert first(reports, messages.JobReleased) == messages.JobReleased("one")
    stopping.join()


def test_a_lost_device_is_reported_before_the_process_ends(
    working: tuple[Runner, Iterator[Any]], tmp_path: Path
) -> None:
    gpu_runner, reports = working
    present = tmp_path / "present"
    present.touch()
    gpu_runner.take_job(job("test/lost"), TEXT % present, {})
    assert first(reports, messages.CrashReported) == messages.CrashReported(["one"])
    gpu_runner.ack_crash()
    stopped = first(reports, messages.RunnerStopped)
    assert stopped.failure == "an illegal memory access was encountered"


def test_directories_of_dead_runners_are_deleted_after_a_while(tmp_path: Path) -> None:
    host = socket.gethostname()
    old, young, elsewhere = (tmp_path / name for name in (f"{host}-4194305", f"{host}-4194306", "other-4194305"))
    for directory in (old, young, elsewhere):
        directory.mkdir()
    for directory in (old, elsewhere):
        os.utime(directory, (0, 0))
    mine = runner._new_directory(tmp_path)
    assert {*tmp_path.iterdir()} == {mine, young, elsewhere}
