"""A watchdog that ends the process when a step hangs: a hung device answers no signal; only a new process helps."""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from server.queue.jobs import Job

log = logging.getLogger(__name__)

#: The exit code after a hung step; a supervisor restarts the process.
EXIT_STUCK = 3


class Watchdog:
    """A deadline on what each thread is working on.

    `on_timeout` gets the jobs of a thread past the deadline. `on_change` gets the jobs of all threads at each change.
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
        # Held while a change is made and reported, so that reports arrive in order.
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start checking every second."""
        self._thread.start()

    def stop(self) -> None:
        """Stop checking."""
        self._is_stopped.set()

    @contextmanager
    def watch(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Register this thread as working on these jobs during the block."""
        me = threading.get_ident()
        outer = self._watched.get(me)
        try:
            self._put(me, (self._clock(), jobs))
            yield
        finally:
            self._put(me, outer)

    def check(self) -> None:
        """Report each thread that is past the deadline."""
        now = self._clock()
        for started, jobs in list(self._watched.values()):
            if now - started > self._deadline:
                self._on_timeout(jobs)

    def _put(self, thread: int, entry: tuple[float, Sequence[Job]] | None) -> None:
        with self._lock:
            if entry is None:
                del self._watched[thread]
            else:
                self._watched[thread] = entry
            if self._on_change:
                self._on_change({thread: jobs for thread, (_, jobs) in self._watched.items()})

    def _run(self) -> None:
        while not self._is_stopped.wait(1):
            self.check()


def abort_process(deadline: float, jobs: Sequence[Job]) -> None:
    """Log what hangs and exit at once: no code can stop a thread inside a driver."""
    names = ", ".join(job.request_id for job in jobs)
    log.critical("a step of %s took longer than --step-deadline (%g s); the process ends", names, deadline)
    faulthandler.dump_traceback()
    logging.shutdown()
    os._exit(EXIT_STUCK)
