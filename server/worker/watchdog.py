"""A watchdog that ends the process when a step hangs, because nothing can interrupt a thread inside a GPU driver."""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from server.queue.jobs import Job

log = logging.getLogger(__name__)

#: The exit code after a hung step. The process's supervisor, such as systemd, restarts it.
EXIT_STUCK = 3


class Watchdog:
    """A watchdog over threads that work on jobs: each watched block may take `deadline` seconds.

    The watchdog calls `on_timeout` with the jobs of a thread past the deadline. It calls `on_change` with the jobs of
    all watched threads, by thread id, whenever a block begins or ends.
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
        # Held while a change is made and reported, so that `on_change` gets the changes in order.
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start a thread that calls `check` every second."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the checks; do not wait for their thread."""
        self._is_stopped.set()

    @contextmanager
    def watch(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Watch the block as this thread's work on these jobs. During a nested block, only the inner one is watched."""
        me = threading.get_ident()
        outer = self._watched.get(me)
        try:
            self._put(me, (self._clock(), jobs))
            yield
        finally:
            self._put(me, outer)

    def check(self) -> None:
        """Call `on_timeout` for each thread that is past the deadline."""
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
    """Log the jobs whose step hangs and all stack traces, then exit at once with EXIT_STUCK."""
    names = ", ".join(job.request_id for job in jobs)
    message = "a step of %s took longer than --step-deadline (%g s); the process ends and needs a restart"
    log.critical(message, names, deadline)
    faulthandler.dump_traceback()
    logging.shutdown()
    os._exit(EXIT_STUCK)
