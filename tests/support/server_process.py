"""A real server in a separate process, on free ports."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
from pydantic_core import from_json

from tests.support import forking
from tests.support.forking import ForkedProcess

ROOT = Path(__file__).parents[2]
MODELS = Path(__file__).parent / "models"

#: `TEST_RAY=local pytest ...` runs the same tests with runners on Ray.
CLUSTER = {"RAY": os.environ["TEST_RAY"], "GPUS": "1"} if "TEST_RAY" in os.environ else {}
#: A value of WEIGHTS that serves the test models only. Such a server starts at once, because it loads no weights.
TEST_MODELS = "test/null=demo"


class Server:
    """A running `flux-server serve`. `within` is a prefix of its command, such as nsenter with arguments."""

    def __init__(self, data_dir: Path, *weights: str, within: Sequence[str] = (), **settings: str) -> None:
        self.data_dir = data_dir
        self.settings = {
            "PORT": "0",
            "TLS_PORT": "0",
            "DATA_DIR": str(data_dir),
            "MODELS_DIR": str(MODELS),
            **CLUSTER,
            **{name.upper(): value for name, value in settings.items()},
        }
        self.process, self.stdout = self._start(["serve", *(weights or ("demo",))], within)
        self.lines: list[str] = []
        self._output_changed = threading.Condition()
        self._has_ended = False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _start(
        self, arguments: Sequence[str], within: Sequence[str]
    ) -> "tuple[subprocess.Popen[str] | ForkedProcess, IO[str]]":
        environment = self.environment()
        if not within and forking.can_fork(environment):
            receiving, sending = os.pipe()
            try:
                process = forking.fork(arguments, environment, stdin=0, stdout=sending, stderr=sending)
            finally:
                os.close(sending)
            return process, os.fdopen(receiving, encoding="utf-8")
        command = [*within, sys.executable, "-m", "server", *arguments]
        started = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert started.stdout
        return started, started.stdout

    def environment(self) -> dict[str, str]:
        """Return this process's environment without variables of fal, and with the settings of this server only."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FAL_", "FLUX_SERVER_"))}
        return {**inherited, **{f"FLUX_SERVER_{name}": value for name, value in self.settings.items()}}

    def _read(self) -> None:
        for line in self.stdout:
            with self._output_changed:
                self.lines.append(line)
                self._output_changed.notify_all()
        with self._output_changed:
            self._has_ended = True
            self._output_changed.notify_all()

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Wait for output that matches `pattern`; fail if the server ends or prints no match within `seconds`."""
        with self._output_changed:
            self._output_changed.wait_for(lambda: self._has_ended or re.search(pattern, self.output), seconds)
            found = re.search(pattern, self.output)
        assert found, f"no match of {pattern!r} in the server's output:\n{self.output}"
        return found

    @property
    def output(self) -> str:
        """All output up to now."""
        return "".join(self.lines)

    @property
    def url(self) -> str:
        """The URL for plain HTTP."""
        return self.wait_for(r"listens on (http://\S+)")[1]

    @property
    def tls_host(self) -> str:
        """Host and port for TLS, as fal-client expects them."""
        return "localhost:" + self.wait_for(r"and https://[^:]+:(\d+)")[1]

    def ready(self) -> "Server":
        """Wait until the server can generate images; return the server. On a busy machine, weights load slowly."""
        self.wait_for(r"ready \[server\.worker\.worker\]|\"message\": \"ready\"", seconds=110)
        return self

    def kill(self) -> None:
        """Send SIGKILL and wait until the process has ended."""
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = 60) -> int:
        """Send SIGTERM, as an operator does; return the exit code. Print the output of a server that failed."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(seconds)
        if code:
            self.reader.join()
            print(self.output)
        return code


@contextmanager
def serving(data_dir: Path, *weights: str, within: Sequence[str] = (), **settings: str) -> Iterator[Server]:
    """Run a server. If it still runs at the end of the block, kill it."""
    server = Server(data_dir, *weights, within=within, **settings)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
        server.reader.join()
        server.stdout.close()


def free_port() -> int:
    """Return a free port, for settings where port 0 means off."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving_with_proxy(data_dir: Path, *weights: str, **settings: str) -> Iterator[Server]:
    """Run a ready server with TLS and the CONNECT proxy."""
    ports = {name: str(free_port()) for name in ("port", "tls_port", "proxy_port")}
    with serving(data_dir, *weights, **{**ports, **settings}) as running:
        yield running.ready()


class Gate:
    """The named pipe that test/gate reads from.

    This object holds both ends of the pipe open, so that a process that opens the pipe does not wait for another.
    """

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR)

    def release(self, steps: int) -> None:
        """Let the model take this many steps."""
        os.write(self._descriptor, b"." * steps)

    def release_all(self) -> None:
        """Release all waiting jobs. Later jobs fail at once, because the pipe no longer exists."""
        if self.path.exists():
            self.path.unlink()
            os.close(self._descriptor)


@contextmanager
def open_gate(path: Path) -> Iterator[Gate]:
    """Create a gate. At the end, release all jobs, so that a failed test blocks no other test."""
    gate = Gate(path)
    try:
        yield gate
    finally:
        gate.release_all()


def statuses(client: httpx.Client, status_url: str) -> Iterator[dict[str, Any]]:
    """Yield each event of the status stream: a status with the log lines since the event before."""
    with client.stream("GET", f"{status_url}/stream", params={"logs": "1"}, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield from_json(line.removeprefix("data: "))


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition is true that only the client can check; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition is not true after {seconds:.0f} seconds"
        time.sleep(0.01)


def wait_until_claimed(client: httpx.Client, status_url: str) -> dict[str, Any]:
    """Wait until a job has been claimed; return its first status after that."""
    return next(status for status in statuses(client, status_url) if status["status"] != "IN_QUEUE")


def wait_until_completed(client: httpx.Client, status_url: str) -> dict[str, Any]:
    """Follow the status stream to its end; return the last status."""
    last: dict[str, Any] = {}
    for status in statuses(client, status_url):
        last = status
    return last
