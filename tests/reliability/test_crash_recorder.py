"""Tests of the crash recorder: a crashing process records the running job; after three crashes only this job fails."""

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
from tests.support.components import claim_job, open_components
from tests.support.faults.points import AT_START
from tests.support.server_process import ROOT, serving, wait_until_completed

MODELS = str(ROOT / "tests" / "support" / "faults" / "cluster")
QUEUE_PATH = "/queue/test/fatal"


def body(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "num_inference_steps": 3, "image_size": {"width": 64, "height": 64}, "seed": 1}


def submit(client: httpx.Client, prompt: str) -> str:
    """Submit a request and return its status path. The same prompt gives the same request."""
    answer = client.post(QUEUE_PATH, json=body(prompt), headers={"idempotency-key": prompt})
    return httpx.URL(answer.json()["status_url"]).path


def crash_repeatedly(data_dir: Path, signal_name: str, times: int) -> str:
    """Submit a request that kills each server with this signal; run `times` servers and return the last output."""
    output = ""
    for attempt in range(times):
        with serving(data_dir, "test/fatal=demo", models_dir=MODELS) as server:
            if attempt == 0:
                # The process may die after it commits the row and before its answer leaves.
                with (
                    httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
                    contextlib.suppress(httpx.TransportError),
                ):
                    submit(client, signal_name)
            assert server.process.wait(60) == -signal.Signals[signal_name]
        output = server.output
    return output


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
def test_only_the_job_that_crashes_the_server_three_times_fails(tmp_path: Path, name: str) -> None:
    assert "the last process crashed while it was running" in crash_repeatedly(tmp_path, name, 3)
    with (
        serving(tmp_path, "test/fatal=demo", models_dir=MODELS) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        error = wait_until_completed(client, submit(client, name))["error"]
        assert error == "The server crashed 3 times while it ran this request."
        assert wait_until_completed(client, submit(client, "x")).get("error") is None


def write_crash_of_running_job(data_dir: Path) -> None:
    """Write a data directory whose last process crashed while a request was running."""
    with open_components(data_dir) as components:
        job = claim_job(components, endpoint="test/crash")
    (data_dir / "at_work.json").write_text(json.dumps({"7f": [job.request_id]}))
    (data_dir / "crash.txt").write_text("Fatal Python error: Aborted\n\nCurrent thread 0x000000000000007f (most recent")


@pytest.mark.parametrize("point", AT_START)
def test_a_kill_at_startup_keeps_the_crash_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    monkeypatch.setenv("CRASH_AT", point)
    monkeypatch.setenv("CRASH_MARKER", str(tmp_path / "marker"))
    write_crash_of_running_job(tmp_path / "data")
    models = str(ROOT / "tests" / "support" / "faults" / "models")
    with serving(tmp_path / "data", "test/crash=demo", models_dir=models) as server:
        assert server.process.wait(60) == -9
    with serving(tmp_path / "data", "test/crash=demo", models_dir=models) as server:
        assert server.ready().stop() == 0
    with open_components(tmp_path / "data") as components:
        assert components.rows("SELECT strikes FROM jobs") == [(1,)]


def test_startup_on_a_full_disk_keeps_the_crash_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the start fails, as for every write that fails, and that the next start still finds the record."""
    write_crash_of_running_job(tmp_path)
    recorded = CrashRecorder(tmp_path).read()
    app = create_app(Settings.load({}, {"data_dir": tmp_path, "models_dir": MODELS, "weights": "test/fatal=demo"}))
    monkeypatch.setattr(job_table, "count_crash", lambda *args: (_ for _ in ()).throw(DiskFull()))

    async def start() -> None:
        async with app.router.lifespan_context(app):
            pass

    try:
        with pytest.raises(DiskFull):
            asyncio.run(start())
    finally:
        app.state.services.queue._database.close()
    assert CrashRecorder(tmp_path).read() == recorded


def test_sigkill_counts_as_no_crash(tmp_path: Path) -> None:
    crash_repeatedly(tmp_path, "SIGKILL", 4)
    with open_components(tmp_path) as components:
        assert components.rows("SELECT state, attempt, strikes FROM jobs") == [("IN_PROGRESS", 4, 0)]


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL", "SIGKILL", "SIGTERM"])
def test_only_faults_leave_a_trace(tmp_path: Path, name: str) -> None:
    """Compare the recorder with the signals listed in docs/operations.md."""
    code = (
        "import pathlib, signal, sys; from server.worker.crash_recorder import CrashRecorder;"
        "CrashRecorder(pathlib.Path(sys.argv[1])).open(); signal.raise_signal(signal.Signals[sys.argv[2]])"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path), name], cwd=ROOT, capture_output=True)
    assert process.returncode == -signal.Signals[name]
    documented = re.search(r"A process that dies by (.*) leaves a trace", (ROOT / "docs" / "operations.md").read_text())
    assert documented
    assert bool(CrashRecorder(tmp_path).read()[0]) == (name in documented[1])


def test_a_clean_exit_records_no_crash(tmp_path: Path) -> None:
    assert CrashRecorder(tmp_path).read() == ("", [])
    with serving(tmp_path, "test/fatal=demo", models_dir=MODELS) as server:
        assert server.ready().stop() == 0
    assert CrashRecorder(tmp_path).read() == ("", [])


def test_only_jobs_of_the_crashed_thread_are_suspects(tmp_path: Path) -> None:
    (tmp_path / "at_work.json").write_text('{"7f5f4b4666c0": ["one"], "7f5f4b466700": ["two"]}\nrest of a longer one')
    trace = tmp_path / "crash.txt"
    for thread, suspects in (("00007f5f4b4666c0", ["one"]), ("00007f0000000000", [])):
        trace.write_text(f"Fatal Python error: Aborted\n\nCurrent thread 0x{thread} (most recent call first):\n")
        assert CrashRecorder(tmp_path).read()[1] == suspects
    trace.write_text("Fatal Python error: Segmentation fault\n\n<no Python frame>\n")
    assert CrashRecorder(tmp_path).read()[1] == ["one", "two"]
    trace.write_text("")
    assert CrashRecorder(tmp_path).read() == ("", [])


def test_a_full_disk_does_not_fail_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = CrashRecorder(tmp_path)
    recorder.open()
    try:
        monkeypatch.setattr("os.pwrite", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        recorder.set_running({1: []})
    finally:
        recorder.close()
