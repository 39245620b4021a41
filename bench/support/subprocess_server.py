"""A server of somebody else's, in processes of its own."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import httpx
import psutil

from tests.support.server_process import ROOT


@contextmanager
def answering(command: Sequence[str], url: str, environment: Mapping[str, str]) -> Iterator[None]:
    """Runs it for as long as the block lasts, which begins when this URL is answered by 200."""
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment) as process:
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
    """As an operator does, and after three seconds by force, with all that it started: some are in other sessions."""
    try:
        whole = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    process.terminate()
    for left in psutil.wait_procs(whole, 3)[1]:
        with suppress(psutil.NoSuchProcess):
            left.kill()
