"""A process that dies of a fault of its own tells the next one at which job; three times, and that job fails alone."""

import contextlib
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.black_box import BlackBox
from tests.parts import opened
from tests.serving import ROOT, completed, serving

MODELS = str(ROOT / "tests" / "faults" / "cluster")
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
    assert "the last process died of a fault of its own while it worked at" in died(tmp_path, name, 3)
    with (
        serving(tmp_path, "test/fatal=demo", models_dir=MODELS) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        error = completed(client, submit(client, name))["error"]
        assert error == "The server had to end 3 times while it worked at this request."
        assert completed(client, submit(client, "x")).get("error") is None


def test_a_kill_from_outside_is_nobodys_fault(tmp_path: Path) -> None:
    died(tmp_path, "SIGKILL", 4)
    with opened(tmp_path) as parts:
        assert parts.rows("SELECT state, attempt, strikes FROM jobs") == [("IN_PROGRESS", 4, 0)]


def test_a_box_of_a_process_that_ended_well_says_nothing(tmp_path: Path) -> None:
    assert BlackBox(tmp_path).read() == ("", [])
    with serving(tmp_path, "test/fatal=demo", models_dir=MODELS) as server:
        assert server.ready().stop() == 0
    assert BlackBox(tmp_path).read() == ("", [])


def test_a_thread_that_is_at_no_job_is_nobodys_fault(tmp_path: Path) -> None:
    (tmp_path / "at_work.json").write_text('{"7f5f4b4666c0": ["one"], "7f5f4b466700": ["two"]}\nrest of a longer one')
    trace = tmp_path / "crash.txt"
    for thread, suspects in (("00007f5f4b4666c0", ["one"]), ("00007f0000000000", [])):
        trace.write_text(f"Fatal Python error: Aborted\n\nCurrent thread 0x{thread} (most recent call first):\n")
        assert BlackBox(tmp_path).read()[1] == suspects
    trace.write_text("Fatal Python error: Segmentation fault\n\n<no Python frame>\n")
    assert BlackBox(tmp_path).read()[1] == ["one", "two"]
    trace.write_text("")
    assert BlackBox(tmp_path).read() == ("", [])


def test_a_full_disk_ends_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = BlackBox(tmp_path)
    box.open()
    try:
        monkeypatch.setattr("os.pwrite", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        box.note({1: []})
    finally:
        box.close()
