"""Tests of the server's logs, read from a pipe as by a machine and from a terminal as by a person."""

import json
import logging
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server import logs
from tests.support.server_process import ROOT, TEST_MODELS, Gate, serving

SECRET = "nobody's business"


def events(lines: list[str]) -> list[dict[str, object]]:
    """Return the events logged as JSON."""
    return [json.loads(line) for line in lines]


def test_each_request_is_one_line_of_json(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS, log_format="json", log_level="debug") as server:
        with httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client:
            succeeded = client.post("/test/null", json={"prompt": SECRET})
            failed = client.post("/test/raises", json={"prompt": SECRET})
            client.post("/queue/test/null", json={"prompt": SECRET})
            rejected = client.post("/test/null", json={"prompt": SECRET, "num_images": 99})
        server.stop()
        server.reader.join()
        logged = events(server.lines)
    lines = [event for event in logged if event["logger"] == "server.queue.request_log"]
    assert len(lines) == 3
    by_id = {str(event["request_id"]): event for event in lines}
    raised = [event for event in logged if "exception" in event]
    assert set(by_id) > {response.headers["x-fal-request-id"] for response in (succeeded, failed)}
    # A rejected request can be found by its id too.
    (event,) = [event for event in logged if event.get("request_id") == rejected.headers["x-fal-request-id"]]
    assert event["message"] == "POST /{endpoint:path} 422"
    success, failure = (by_id[response.headers["x-fal-request-id"]] for response in (succeeded, failed))
    assert (success["endpoint"], success["status"], success["billable_units"], success["level"]) == (
        "test/null",
        200,
        1,
        "info",
    )
    assert (failure["endpoint"], failure["status"]) == ("test/raises", 500)
    assert [event["request_id"] for event in raised] == [failed.headers["x-fal-request-id"]]
    assert "secret" in str(raised[0]["exception"])
    assert SECRET not in server.output


def test_a_stream_that_is_cut_off_on_purpose_logs_no_error(tmp_path: Path, gate: Gate) -> None:
    """Streams are cut off when a request fails or the server stops. The missing end shows this to the client."""
    with serving(tmp_path / "data", TEST_MODELS, shutdown_grace="0") as server:
        for endpoint, message in (("test/raises", "internal_error"), ("test/gate", "The server is stopping.")):
            with (
                httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
                client.stream("POST", f"/{endpoint}/stream", json={"prompt": str(gate.path)}) as response,
            ):
                if endpoint == "test/gate":
                    server.process.terminate()
                last = ""
                with pytest.raises(httpx.RemoteProtocolError):
                    for line in response.iter_lines():
                        last = line or last
                assert message in last
        assert server.process.wait(60) == 0
    assert "uvicorn" not in server.output


@contextmanager
def on_a_terminal(command: list[str]) -> Iterator[int]:
    """Run a program on a pseudo-terminal, and yield the descriptor from which its output is read."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=slave, stderr=slave, stdin=slave)
    os.close(slave)
    try:
        yield master
    finally:
        process.kill()
        process.wait()
        os.close(master)


def read_until(descriptor: int, pattern: str) -> str:
    """Read until the output matches the pattern, and return the output."""
    output = ""
    while not re.search(pattern, output):
        output += os.read(descriptor, 65_536).decode(errors="replace")
    return output


@pytest.mark.timeout(60)
def test_a_terminal_shows_colours_and_a_progress_bar(tmp_path: Path, gate: Gate) -> None:
    """The program runs in a new process, because logs are set up once in each process."""
    program = f"""
import logging, pathlib
from models.base import LoadProgress
from server import logs
logs.set_up("info", "text")
log = logging.getLogger("server.worker.worker")
for number in (0, 1_000_000_000):
    loading = LoadProgress("transformer", number, 4_000_000_000)
    log.info("words for a file", extra={{"loading": loading}})
with pathlib.Path({str(gate.path)!r}).open("rb", buffering=0) as gate:
    gate.read(1)
log.info("ready", extra={{"request_id": "abc"}})
"""
    with on_a_terminal([sys.executable, "-c", program]) as terminal:
        loading = read_until(terminal, r"loading transformer:\s+25%.*1\.00G/4\.00G")
        gate.release(1)
        ready = read_until(terminal, "abc")
    assert "words for a file" not in loading
    # The line is in colour, and replaces the progress bar.
    assert re.search(r"\x1b\[\d+m", ready)
    assert re.search(r"\r[^\n]*ready", ready)


def test_a_file_has_neither_progress_bar_nor_colours(tmp_path: Path) -> None:
    program = """
import logging
from models.base import LoadProgress
from server import logs
logs.set_up("info", "text")
logging.getLogger("server.worker.worker").info("half of it is here", extra={"loading": LoadProgress("vae", 1, 2)})
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[info\] half of it is here \[server\.worker\.worker\]\n", result.stderr
    )


def test_a_traceback_shows_no_variables(capsys: pytest.CaptureFixture[str]) -> None:
    formatter = logs._formatter("text", has_colours=False)
    try:
        prompt = SECRET
        raise ValueError(len(prompt))
    except ValueError:
        record = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    output = formatter.format(record)
    assert "ValueError: " in output
    assert SECRET not in output


def test_text_from_clients_adds_no_lines() -> None:
    formatter = logs._formatter("text", has_colours=False)
    message = "a name\n2026-01-01 all is well\x1b[2J\x9b"
    output = formatter.format(logging.getLogger("x").makeRecord("x", logging.INFO, "f", 1, message, (), None))
    assert output.isprintable()
    assert "\\n2026" in output
