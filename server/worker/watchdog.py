"""Ends the process when a step does not end: a device that hangs answers no signal, only a new process helps."""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from server.queue.jobs import Job

log = logging.getLogger(__name__)

#: The process's exit code then, which a supervisor answers by starting it again.
EXIT_STUCK = 3


class Watchdog:
    """Looks at what each thread is at.

    `on_timeout` is told the jobs of one that is past the deadline, `on_change` each time what all of them are at.
    """

    def __init__(
        self,
        deadline: float,
        on_timeout: Callable[[Sequence[Job]], None],
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[Mapping[int, Sequence[Job]]], None] | None = None,
    ) -> None:
        self._deadline = deadline
        self._on_timeout = on_timeout
        self._on_change = on_change
        self._clock = clock
        self._watched: dict[int, tuple[float, Sequence[Job]]] = {}
        # Over a change and the note of it, so that the newest note is the last one.
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Look every second."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._is_stopped.set()

    @contextmanager
    def watch(self, jobs: Sequence[Job]) -> Iterator[None]:
        """While the block lasts, this thread works at these jobs."""
        me = threading.get_ident()
        around = self._watched.get(me)
        try:
            self._put(me, (self._clock(), jobs))
            yield
        finally:
            self._put(me, around)

    def check(self) -> None:
        """Tell of a thread that is late."""
        now = self._clock()
        for started, jobs in list(self._watched.values()):
            if now - started > self._deadline:
                self._on_timeout(jobs)

    def _put(self, thread: int, what: tuple[float, Sequence[Job]] | None) -> None:
        with self._lock:
            if what is None:
                del self._watched[thread]
            else:
                self._watched[thread] = what
            if self._on_change:
                self._on_change({thread: jobs for thread, (_, jobs) in self._watched.items()})

    def _run(self) -> None:
        while not self._is_stopped.wait(1):
            self.check()


def abort_process(deadline: float, jobs: Sequence[Job]) -> None:
    """Say what hangs, and exit at once: nothing here can stop a thread inside a driver."""
    names = ", ".join(job.request_id for job in jobs)
    log.critical("a step of %s took longer than --step-deadline (%g s); the process ends", names, deadline)
    faulthandler.dump_traceback()
    logging.shutdown()
    os._exit(EXIT_STUCK)
