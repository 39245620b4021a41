"""What is left when the steps are done: pictures are encoded, written, and the job is ended."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from models.base import DeviceLost, Engine
from server.errors import ClientCancelled, DiskFull
from server.metrics import Metrics
from server.queue.jobs import Job, Outcome
from server.queue.notifier import Notifier
from server.storage.durable import wait_for_room
from server.worker.interfaces import JobSource
from server.worker.results import ResultBuilder
from server.worker.running_job import RunningJob, outcome_from_exception
from server.worker.watchdog import Watchdog

log = logging.getLogger(__name__)


#: Seconds beyond the grace: enough to encode and write a picture, so that only its decoding is given up.
SHUTDOWN_MARGIN = 1.0


class Postprocessor:
    """Ends jobs in the order in which they come, beside the worker's steps."""

    def __init__(
        self,
        queue: JobSource,
        answers: ResultBuilder,
        notifier: Notifier,
        watchdog: Watchdog,
        on_failure: Callable[[BaseException], None],
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._queue = queue
        self._results = answers
        self._notifier = notifier
        self._watchdog = watchdog
        self._on_failure = on_failure
        self._pending: deque[tuple[Job, RunningJob | Outcome]] = deque()
        self._current: RunningJob | Outcome | None = None
        self._wake = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="finisher", daemon=True)

    def __len__(self) -> int:
        """How many jobs wait for their end."""
        return len(self._pending) + (self._current is not None)

    @property
    def engines(self) -> set[Engine]:
        """Those that still have something to decode or to judge here."""
        ends = [self._current, *(end for _, end in tuple(self._pending))]
        return {end.engine for end in ends if isinstance(end, RunningJob)}

    def add(self, job: Job, end: RunningJob | Outcome) -> None:
        """A job that is painted, or one whose outcome is known."""
        self._pending.append((job, end))
        self._wake.set()

    def start(self) -> None:
        """Work on a thread of its own."""
        self._thread.start()

    def stop(self, stop_at: float) -> None:
        """Return when the job at hand has ended, or soon after `stop_at`; the rest goes back to the queue."""
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(max(0.0, stop_at - time.monotonic()) + SHUTDOWN_MARGIN)
        # What is at hand still is left to the next start.
        while self._pending:
            self._queue.release(self._pending.popleft()[0])

    def run_once(self) -> bool:
        """End one job; False when none waits. Raises DiskFull, and goes on with the same job the next time."""
        try:
            job, end = self._pending[0]
        except IndexError:
            return False
        # In this order, so that its engine is never seen as idle.
        self._current = end
        self._pending.popleft()
        try:
            if isinstance(end, RunningJob):
                end = self._outcome(end)
            is_shown = self._queue.finish(job, end)
        except DiskFull:
            # With its outcome, if it has one: it is not made again.
            self._pending.appendleft((job, end))
            raise
        finally:
            self._current = None
        if not is_shown:
            self._results.discard(end.files)
        # There is room for another.
        self._notifier.work_available.set()
        return True

    def _outcome(self, running: RunningJob) -> Outcome:
        """Decoded and judged if that was left to this thread, then encoded and written."""
        try:
            with self._watchdog.watch([running.job]):
                while not running.is_decoded:
                    if running.job.is_cancelled:
                        return Outcome.from_error(ClientCancelled())
                    running.decode_next()
            outcome = self._results.outcome(running.job, running.model, running.request, running.result)
            self._metrics.count_images(running.job.endpoint, len(running.result.images), sum(running.result.flags))
            return outcome
        except DiskFull:
            raise
        except DeviceLost:
            self._queue.record_crash([running.job])
            raise
        except Exception as error:
            return outcome_from_exception(error, running.job)

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                if not self._try_run_once():
                    self._wake.wait()
                # Before the next look at anything: what rings after it is heard by the next wait.
                self._wake.clear()
        except BaseException as error:
            self._on_failure(error)

    def _try_run_once(self) -> bool:
        try:
            return self.run_once()
        except DiskFull as error:
            wait_for_room(error, log, self._wake.wait)
            return True
