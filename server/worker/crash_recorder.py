"""A record of the jobs that run when a process crashes, which the next process reads."""

import contextlib
import faulthandler
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.queue.jobs import Job


class CrashRecorder:
    """A recorder that keeps two files: the current jobs of each thread, and a stack trace if the process crashes.

    Python writes the trace when SIGSEGV, SIGBUS, SIGABRT, SIGFPE or SIGILL kills the process. SIGKILL and SIGTERM,
    which come from outside, leave no trace.
    """

    def __init__(self, directory: Path) -> None:
        self._running_file, self._trace = directory / "at_work.json", directory / "crash.txt"

    def open(self) -> None:
        """Delete the previous record and start recording."""
        self._descriptor = os.open(self._running_file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._file = os.fdopen(os.open(self._trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w")
        faulthandler.enable(self._file)

    def close(self) -> None:
        """Stop recording."""
        faulthandler.disable()
        os.close(self._descriptor)
        self._file.close()

    def set_running(self, working: Mapping[int, Sequence[Job]]) -> None:
        """Record the current jobs of each thread; without fsync, because the record must only outlive the process."""
        names = {f"{thread:x}": [job.request_id for job in jobs] for thread, jobs in working.items()}
        # A longer line from an earlier call leaves its tail after this line, so `read` uses only the first line. A full
        # disk must not fail a job, so errors are ignored.
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, f"{json.dumps(names)}\n".encode(), 0)

    def read(self) -> tuple[str, list[str]]:
        """Return the last process's stack trace, and the ids of the requests that may have crashed it.

        Both are empty if the process did not crash.
        """
        try:
            trace = self._trace.read_text(encoding="utf-8", errors="replace")
            working = json.loads(self._running_file.read_text(encoding="utf-8").partition("\n")[0] or "{}")
        except (OSError, ValueError):
            return "", []
        if thread := re.search(r"^Current thread 0x0*([0-9a-f]+)", trace, re.MULTILINE):
            return trace, working.get(thread[1], [])
        # The crash was in a library's thread, which Python does not know, so any running job may have caused it.
        return trace, [request_id for ids in working.values() for request_id in ids] if trace else []


def load_crash(directory: str) -> tuple[str, list[str]]:
    """Read the crash record in this directory, as `CrashRecorder.read` does. Ray runs this function on other nodes."""
    return CrashRecorder(Path(directory)).read()
