"""A real server in a process of its own, on free ports."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from pydantic_core import from_json

ROOT = Path(__file__).parents[2]
MODELS = Path(__file__).parent / "models"

#: `TEST_RAY=local pytest ...` runs the same tests on runners of Ray's.
CLUSTER = {"RAY": os.environ["TEST_RAY"], "GPUS": "1"} if "TEST_RAY" in os.environ else {}
#: As WEIGHTS: the test models alone. Without torch a server starts at once.
TEST_MODELS = "test/null=demo"


class Server:
    """A running `flux-server serve`; `within` is a command that runs it somewhere else, such as nsenter."""

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
        self.process = subprocess.Popen(
            [*within, sys.executable, "-m", "server", "serve", *(weights or ("demo",))],
            cwd=ROOT,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._said = threading.Condition()
        self._is_over = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def environment(self) -> dict[str, str]:
        """The environment of the server: the machine's, without what would change the server."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("FAL_", "FLUX_SERVER_"))}
        return {**clean, **{f"FLUX_SERVER_{name}": value for name, value in self.settings.items()}}

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._said:
                self.lines.append(line)
                self._said.notify_all()
        with self._said:
            self._is_over = True
            self._said.notify_all()

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Wait until the server says this; raises when it ends or is silent instead."""
        with self._said:
            self._said.wait_for(lambda: self._is_over or re.search(pattern, self.output), seconds)
            found = re.search(pattern, self.output)
        assert found, f"the server did not say {pattern!r} but:\n{self.output}"
        return found

    @property
    def output(self) -> str:
        """All it said."""
        return "".join(self.lines)

    @property
    def url(self) -> str:
        """Its plain address."""
        return self.wait_for(r"listens on (http://\S+)")[1]

    @property
    def tls_host(self) -> str:
        """Its TLS address as fal-client wants it: host and port."""
        return "localhost:" + self.wait_for(r"and https://[^:]+:(\d+)")[1]

    def ready(self) -> "Server":
        """Wait until it can paint."""
        self.wait_for(r"ready \[server\.worker\.worker\]|\"message\": \"ready\"")
        return self

    def kill(self) -> None:
        """As kill -9 does."""
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = 60) -> int:
        """As an operator does; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextmanager
def serving(data_dir: Path, *weights: str, within: Sequence[str] = (), **settings: str) -> Iterator[Server]:
    """A server for as long as the block lasts, which then ends whatever way it must."""
    server = Server(data_dir, *weights, within=within, **settings)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
        server._reader.join()
        if server.process.stdout:
            server.process.stdout.close()


def free_port() -> int:
    """A port of this machine that nobody has, where 0 stands for off."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def with_door(data_dir: Path, *weights: str, **settings: str) -> Iterator[Server]:
    """A server that paints, with TLS and the CONNECT door."""
    ports = {name: str(free_port()) for name in ("port", "tls_port", "proxy_port")}
    with serving(data_dir, *weights, **{**ports, **settings}) as running:
        yield running.ready()


class Gate:
    """The named pipe that test/gate waits at: held open here, so that neither side ever waits to open it."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR)

    def let(self, steps: int) -> None:
        """Let this many steps go."""
        os.write(self._descriptor, b"." * steps)

    def open(self) -> None:
        """Let all go, also those who come later: without its pipe a job fails at once."""
        if self.path.exists():
            self.path.unlink()
            os.close(self._descriptor)


@contextmanager
def gated(path: Path) -> Iterator[Gate]:
    """A gate that is open at the end, so that a failed test holds up nobody."""
    gate = Gate(path)
    try:
        yield gate
    finally:
        gate.open()


def statuses(client: httpx.Client, status_url: str) -> Iterator[dict[str, Any]]:
    """Each event of the status stream, with the new log lines."""
    with client.stream("GET", f"{status_url}/stream", params={"logs": "1"}, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield from_json(line.removeprefix("data: "))


def in_progress(client: httpx.Client, status_url: str) -> dict[str, Any]:
    """Wait until a job was claimed."""
    return next(status for status in statuses(client, status_url) if status["status"] != "IN_QUEUE")


def completed(client: httpx.Client, status_url: str) -> dict[str, Any]:
    """Follow the status stream to its end; returns the last status."""
    last: dict[str, Any] = {}
    for status in statuses(client, status_url):
        last = status
    return last
