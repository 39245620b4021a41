"""What the server says while it runs, read from a pipe as a machine does and from a terminal as people do."""

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
    """What was logged as JSON; the server's greeting is not."""
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_each_request_is_one_line_of_json(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS, log_format="json", log_level="debug") as server:
        with httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client:
            painted = client.post("/test/null", json={"prompt": SECRET})
            failed = client.post("/test/raises", json={"prompt": SECRET})
            client.post("/queue/test/null", json={"prompt": SECRET})
            refused = client.post("/test/null", json={"prompt": SECRET, "num_images": 99})
        server.stop()
        server._reader.join()
        said = events(server.lines)
    lines = [event for event in said if event["logger"] == "server.queue.request_log"]
    assert len(lines) == 3
    told = {str(event["request_id"]): event for event in lines}
    raised = [event for event in said if "exception" in event]
    assert set(told) > {answer.headers["x-fal-request-id"] for answer in (painted, failed)}
    # One that was never accepted is found by its id too.
    (event,) = [event for event in said if event.get("request_id") == refused.headers["x-fal-request-id"]]
    assert event["message"] == "POST /{endpoint:path} 422"
    well, badly = (told[answer.headers["x-fal-request-id"]] for answer in (painted, failed))
    assert (well["endpoint"], well["status"], well["billable_units"], well["level"]) == ("test/null", 200, 1, "info")
    assert (badly["endpoint"], badly["status"]) == ("test/raises", 500)
    assert [event["request_id"] for event in raised] == [failed.headers["x-fal-request-id"]]
    assert "secret" in str(raised[0]["exception"])
    assert SECRET not in server.output


def test_a_stream_that_is_cut_off_on_purpose_is_no_error_of_the_server(tmp_path: Path, gate: Gate) -> None:
    """One whose request fails, and one that the stop ends: its client is told by the end that is missing."""
    with serving(tmp_path / "data", TEST_MODELS, shutdown_grace="0") as server:
        for endpoint, words in (("test/raises", "internal_error"), ("test/gate", "The server is stopping.")):
            with (
                httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
                client.stream("POST", f"/{endpoint}/stream", json={"prompt": str(gate.path)}) as answer,
            ):
                if endpoint == "test/gate":
                    server.process.terminate()
                last = ""
                with pytest.raises(httpx.RemoteProtocolError):
                    for line in answer.iter_lines():
                        last = line or last
                assert words in last
        assert server.process.wait(60) == 0
    assert "uvicorn" not in server.output


@contextmanager
def on_a_terminal(command: list[str]) -> Iterator[int]:
    """A program that believes that somebody watches; what it writes is read from the descriptor."""
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
    """All that is written until this is."""
    said = ""
    while not re.search(pattern, said):
        said += os.read(descriptor, 65_536).decode(errors="replace")
    return said


@pytest.mark.timeout(60)
def test_people_see_colours_and_a_bar_while_it_loads(tmp_path: Path, gate: Gate) -> None:
    """In a process of its own, because logs are set up once a process."""
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
        gate.let(1)
        ready = read_until(terminal, "abc")
    assert "words for a file" not in loading
    # In colour, and on a line that the bar was wiped from.
    assert re.search(r"\x1b\[\d+m", ready)
    assert re.search(r"\r[^\n]*ready", ready)


def test_in_a_file_there_is_neither_bar_nor_colour(tmp_path: Path) -> None:
    program = """
import logging
from models.base import LoadProgress
from server import logs
logs.set_up("info", "text")
logging.getLogger("server.worker.worker").info("half of it is here", extra={"loading": LoadProgress("vae", 1, 2)})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[info\] half of it is here \[server\.worker\.worker\]\n", done.stderr
    )


def test_a_failure_tells_no_variables(capsys: pytest.CaptureFixture[str]) -> None:
    formatter = logs._formatter("text", has_colours=False)
    try:
        prompt = SECRET
        raise ValueError(len(prompt))
    except ValueError:
        record = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    said = formatter.format(record)
    assert "ValueError: " in said
    assert SECRET not in said


def test_what_clients_send_writes_no_lines_of_its_own() -> None:
    formatter = logs._formatter("text", has_colours=False)
    words = "a name\n2026-01-01 all is well\x1b[2J\x9b"
    said = formatter.format(logging.getLogger("x").makeRecord("x", logging.INFO, "f", 1, words, (), None))
    assert said.isprintable()
    assert "\\n2026" in said
