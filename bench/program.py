"""A server of somebody else's, in processes of its own."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import httpx

from tests.serving import ROOT


@contextmanager
def answering(command: Sequence[str], url: str, environment: Mapping[str, str]) -> Iterator[None]:
    """Runs it for as long as the block lasts, which begins when this URL is answered by 200."""
    # A session of its own, so that what it starts ends with it.
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, start_new_session=True) as process:
        try:
            _wait(process, url)
            yield
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"{process.args!r} does not answer at {url}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """As an operator does, and after three seconds by force, with whatever it left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)
        os.killpg(process.pid, signal.SIGKILL)
