"""The work after the last step: decode and check images, encode and store them, finish the job."""

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


#: Seconds beyond the grace period: enough to encode and write an image, so that only decoding is abandoned.
SHUTDOWN_MARGIN = 1.0


class Postprocessor:
    """A queue of jobs to finish, in order of arrival, on a separate thread from the worker's steps."""

    def __init__(
        self,
        queue: JobSource,
        results: ResultBuilder,
        notifier: Notifier,
        watchdog: Watchdog,
        on_failure: Callable[[BaseException], None],
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._queue = queue
        self._results = results
        self._notifier = notifier
        self._watchdog = watchdog
        self._on_failure = on_failure
        self._pending: deque[tuple[Job, RunningJob | Outcome]] = deque()
        self._current: RunningJob | Outcome | None = None
        self._wake = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="postprocessor", daemon=True)

    def __len__(self) -> int:
        """Return how many jobs are not finished yet."""
        return len(self._pending) + (self._current is not None)

    @property
    def engines(self) -> set[Engine]:
        """Engines that still have images to decode or check here."""
        ends = [self._current, *(end for _, end in tuple(self._pending))]
        return {end.engine for end in ends if isinstance(end, RunningJob)}

    def add(self, job: Job, end: RunningJob | Outcome) -> None:
        """Add a job with all steps done, or one whose outcome is known."""
        self._pending.append((job, end))
        self._wake.set()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, stop_at: float) -> None:
        """Finish the current job, or give up soon after `stop_at`; release the rest to the queue."""
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(max(0.0, stop_at - time.monotonic()) + SHUTDOWN_MARGIN)
        # A job that is still in progress is requeued at the next start.
        while self._pending:
            self._queue.release(self._pending.popleft()[0])

    def run_once(self) -> bool:
        """Finish one job; return False when none waits. Raises DiskFull; the next call retries the same job."""
        try:
            job, end = self._pending[0]
        except IndexError:
            return False
        # Set first, so that the job's engine never looks idle.
        self._current = end
        self._pending.popleft()
        try:
            if isinstance(end, RunningJob):
                end = self._outcome(end)
            is_accepted = self._queue.finish(job, end)
        except DiskFull:
            # Keep a finished outcome, so that the retry does not build it again.
            self._pending.appendleft((job, end))
            raise
        finally:
            self._current = None
        if not is_accepted:
            self._results.discard(end.files)
        # The worker can claim another job.
        self._notifier.work_available.set()
        return True

    def _outcome(self, running: RunningJob) -> Outcome:
        """Decode and check what is left to this thread, then encode and store the images."""
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
                # Clear before checking again, so that a later `set` ends the next wait.
                self._wake.clear()
        except BaseException as error:
            self._on_failure(error)

    def _try_run_once(self) -> bool:
        try:
            return self.run_once()
        except DiskFull as error:
            wait_for_room(error, log, self._wake.wait)
            return True
