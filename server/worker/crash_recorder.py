"""What was at work when a process died of a fault of its own, for the one that comes after it to read."""

import contextlib
import faulthandler
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.queue.jobs import Job


class CrashRecorder:
    """Two files: who works at which jobs, kept up to date, and the trace that Python leaves when a signal ends it.

    SIGSEGV, SIGBUS, SIGABRT, SIGFPE and SIGILL leave one; SIGKILL and SIGTERM, which come from outside, do not.
    """

    def __init__(self, directory: Path) -> None:
        self._at_work, self._trace = directory / "at_work.json", directory / "crash.txt"

    def open(self) -> None:
        """Record from now on; what was recorded before is gone."""
        self._descriptor = os.open(self._at_work, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._file = os.fdopen(os.open(self._trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w")
        faulthandler.enable(self._file)

    def close(self) -> None:
        """Record no more."""
        faulthandler.disable()
        os.close(self._descriptor)
        self._file.close()

    def set_running(self, working: Mapping[int, Sequence[Job]]) -> None:
        """Remember which thread is at which jobs. Not synced: what a process wrote outlives it, if not the machine."""
        names = {f"{thread:x}": [job.request_id for job in jobs] for thread, jobs in working.items()}
        # One line; what is left of a longer one before it comes after its end. On a full disk it is not worth a job.
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, f"{json.dumps(names)}\n".encode(), 0)

    def read(self) -> tuple[str, list[str]]:
        """The trace that the last process left, and the ids of what its thread was at; empty when it left none."""
        try:
            trace = self._trace.read_text(encoding="utf-8", errors="replace")
            working = json.loads(self._at_work.read_text(encoding="utf-8").partition("\n")[0] or "{}")
        except (OSError, ValueError):
            return "", []
        if thread := re.search(r"^Current thread 0x0*([0-9a-f]+)", trace, re.MULTILINE):
            return trace, working.get(thread[1], [])
        # A thread of a library, which Python does not know: whatever was at work is suspected.
        return trace, [request_id for ids in working.values() for request_id in ids] if trace else []


def load_crash(directory: str) -> tuple[str, list[str]]:
    """What the black box in this folder holds; by itself, so that it is quickly called elsewhere."""
    return CrashRecorder(Path(directory)).read()
