"""A record of the jobs that run when a process crashes, for the next process to read."""

import contextlib
import faulthandler
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.queue.jobs import Job


class CrashRecorder:
    """Two files: the current jobs of each thread, and the stack trace that Python writes when a signal kills it.

    SIGSEGV, SIGBUS, SIGABRT, SIGFPE and SIGILL leave a trace; SIGKILL and SIGTERM, which come from outside, do not.
    """

    def __init__(self, directory: Path) -> None:
        self._running_file, self._trace = directory / "at_work.json", directory / "crash.txt"

    def open(self) -> None:
        """Start recording; the previous record is deleted."""
        self._descriptor = os.open(self._running_file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._file = os.fdopen(os.open(self._trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w")
        faulthandler.enable(self._file)

    def close(self) -> None:
        """Stop recording."""
        faulthandler.disable()
        os.close(self._descriptor)
        self._file.close()

    def set_running(self, working: Mapping[int, Sequence[Job]]) -> None:
        """Write down the current jobs of each thread. Without fsync: the write must outlive only the process."""
        names = {f"{thread:x}": [job.request_id for job in jobs] for thread, jobs in working.items()}
        # Only the first line counts, as a longer one leaves a tail. A full disk must not fail a job.
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, f"{json.dumps(names)}\n".encode(), 0)

    def read(self) -> tuple[str, list[str]]:
        """Return the last process's stack trace and the ids of the jobs blamed; both are empty without a crash."""
        try:
            trace = self._trace.read_text(encoding="utf-8", errors="replace")
            working = json.loads(self._running_file.read_text(encoding="utf-8").partition("\n")[0] or "{}")
        except (OSError, ValueError):
            return "", []
        if thread := re.search(r"^Current thread 0x0*([0-9a-f]+)", trace, re.MULTILINE):
            return trace, working.get(thread[1], [])
        # A library's thread crashed, which Python does not know, so all running jobs are blamed.
        return trace, [request_id for ids in working.values() for request_id in ids] if trace else []


def load_crash(directory: str) -> tuple[str, list[str]]:
    """Read the crash record in this directory; a plain function, because Ray calls it on other nodes."""
    return CrashRecorder(Path(directory)).read()
