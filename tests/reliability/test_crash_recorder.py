"""A process that dies of a fault of its own tells the next one at which job; three times, and that job fails alone."""

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.errors import DiskFull
from server.queue import job_table
from server.settings import Settings
from server.worker.crash_recorder import CrashRecorder
from tests.support.components import claimed, opened
from tests.support.faults.points import AT_START
from tests.support.server_process import ROOT, completed, serving

MODELS = str(ROOT / "tests" / "support" / "faults" / "cluster")
QUEUED = "/queue/test/fatal"


def body(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "num_inference_steps": 3, "image_size": {"width": 64, "height": 64}, "seed": 1}


def submit(client: httpx.Client, prompt: str) -> str:
    """The path of its status, the same for the same prompt."""
    answer = client.post(QUEUED, json=body(prompt), headers={"idempotency-key": prompt})
    return httpx.URL(answer.json()["status_url"]).path


def died(data_dir: Path, name: str, number: int) -> str:
    """A request that ends its server by this signal, in so many lives; what the last of them said."""
    said = ""
    for life in range(number):
        with serving(data_dir, "test/fatal=demo", models_dir=MODELS) as server:
            if life == 0:
                # The process may be gone before the answer has left it, though the row is there.
                with (
                    httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
                    contextlib.suppress(httpx.TransportError),
                ):
                    submit(client, name)
            assert server.process.wait(60) == -signal.Signals[name]
        said = server.output
    return said


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
def test_a_job_that_kills_its_process_three_times_fails_alone(tmp_path: Path, name: str) -> None:
    assert "the last process crashed while it was running" in died(tmp_path, name, 3)
    with (
        serving(tmp_path, "test/fatal=demo", models_dir=MODELS) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        error = completed(client, submit(client, name))["error"]
        assert error == "The server crashed 3 times while it ran this request."
        assert completed(client, submit(client, "x")).get("error") is None


def suspected(data_dir: Path) -> None:
    """A request was at work when the last process died of a fault of its own."""
    with opened(data_dir) as parts:
        job = claimed(parts, endpoint="test/crash")
    (data_dir / "at_work.json").write_text(json.dumps({"7f": [job.request_id]}))
    (data_dir / "crash.txt").write_text("Fatal Python error: Aborted\n\nCurrent thread 0x000000000000007f (most recent")


@pytest.mark.parametrize("point", AT_START)
def test_a_start_that_is_killed_forgets_no_strike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    monkeypatch.setenv("CRASH_AT", point)
    monkeypatch.setenv("CRASH_MARKER", str(tmp_path / "marker"))
    suspected(tmp_path / "data")
    models = str(ROOT / "tests" / "support" / "faults" / "models")
    with serving(tmp_path / "data", "test/crash=demo", models_dir=models) as server:
        assert server.process.wait(60) == -9
    with serving(tmp_path / "data", "test/crash=demo", models_dir=models) as server:
        assert server.ready().stop() == 0
    with opened(tmp_path / "data") as parts:
        assert parts.rows("SELECT strikes FROM jobs") == [(1,)]


def test_a_start_on_a_full_disk_forgets_no_strike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends, as it does wherever something cannot be written; the next one finds all that it needs."""
    suspected(tmp_path)
    left = CrashRecorder(tmp_path).read()
    app = create_app(Settings.load({}, {"data_dir": tmp_path, "models_dir": MODELS, "weights": "test/fatal=demo"}))
    monkeypatch.setattr(job_table, "count_crash", lambda *given: (_ for _ in ()).throw(DiskFull()))

    async def start() -> None:
        async with app.router.lifespan_context(app):
            pass

    try:
        with pytest.raises(DiskFull):
            asyncio.run(start())
    finally:
        app.state.services.queue._database.close()
    assert CrashRecorder(tmp_path).read() == left


def test_a_kill_from_outside_is_nobodys_fault(tmp_path: Path) -> None:
    died(tmp_path, "SIGKILL", 4)
    with opened(tmp_path) as parts:
        assert parts.rows("SELECT state, attempt, strikes FROM jobs") == [("IN_PROGRESS", 4, 0)]


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL", "SIGKILL", "SIGTERM"])
def test_faults_leave_a_trace_and_ends_from_outside_do_not(tmp_path: Path, name: str) -> None:
    """As docs/operations.md says."""
    code = (
        "import pathlib, signal, sys; from server.worker.crash_recorder import CrashRecorder;"
        "CrashRecorder(pathlib.Path(sys.argv[1])).open(); signal.raise_signal(signal.Signals[sys.argv[2]])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), name], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.Signals[name]
    faults = re.search(r"A process that dies by (.*) leaves a trace", (ROOT / "docs" / "operations.md").read_text())
    assert faults
    assert bool(CrashRecorder(tmp_path).read()[0]) == (name in faults[1])


def test_a_box_of_a_process_that_ended_well_says_nothing(tmp_path: Path) -> None:
    assert CrashRecorder(tmp_path).read() == ("", [])
    with serving(tmp_path, "test/fatal=demo", models_dir=MODELS) as server:
        assert server.ready().stop() == 0
    assert CrashRecorder(tmp_path).read() == ("", [])


def test_a_thread_that_is_at_no_job_is_nobodys_fault(tmp_path: Path) -> None:
    (tmp_path / "at_work.json").write_text('{"7f5f4b4666c0": ["one"], "7f5f4b466700": ["two"]}\nrest of a longer one')
    trace = tmp_path / "crash.txt"
    for thread, suspects in (("00007f5f4b4666c0", ["one"]), ("00007f0000000000", [])):
        trace.write_text(f"Fatal Python error: Aborted\n\nCurrent thread 0x{thread} (most recent call first):\n")
        assert CrashRecorder(tmp_path).read()[1] == suspects
    trace.write_text("Fatal Python error: Segmentation fault\n\n<no Python frame>\n")
    assert CrashRecorder(tmp_path).read()[1] == ["one", "two"]
    trace.write_text("")
    assert CrashRecorder(tmp_path).read() == ("", [])


def test_a_full_disk_ends_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = CrashRecorder(tmp_path)
    box.open()
    try:
        monkeypatch.setattr("os.pwrite", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        box.set_running({1: []})
    finally:
        box.close()
