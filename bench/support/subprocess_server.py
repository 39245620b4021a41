"""A context manager that runs a server other than this project's in a separate process."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import httpx
import psutil

from tests.support.server_process import ROOT


@contextmanager
def running_server(command: Sequence[str], url: str, environment: Mapping[str, str]) -> Iterator[None]:
    """Run `command` while the block runs. The block starts once `url` answers 200. Raises SystemExit if it does not."""
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment) as process:
        try:
            _wait(process, url)
            yield
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit(
        f"{process.args!r} did not answer 200 at {url} within {seconds:g} s, or ended early; run it by hand to see why"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate the server; after three seconds, kill those of its processes that remain, in other sessions too."""
    try:
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    process.terminate()
    for survivor in psutil.wait_procs(processes, 3)[1]:
        with suppress(psutil.NoSuchProcess):
            survivor.kill()
