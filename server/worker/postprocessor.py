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


#: Seconds that `stop` waits beyond the grace period. They are enough to encode and write an image; decoding may take
#: longer, and is then abandoned.
SHUTDOWN_MARGIN = 1.0


class Postprocessor:
    """A queue of jobs to finish in order of arrival, on a thread that runs in parallel to the worker's steps."""

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
        """Return the number of unfinished jobs, including the current one."""
        return len(self._pending) + (self._current is not None)

    @property
    def engines(self) -> set[Engine]:
        """The engines of the jobs whose outcome is not known yet. They must not be evicted."""
        ends = [self._current, *(end for _, end in tuple(self._pending))]
        return {end.engine for end in ends if isinstance(end, RunningJob)}

    def add(self, job: Job, end: RunningJob | Outcome) -> None:
        """Add a job. `end` is its RunningJob once all steps are done, or its outcome if that is known already."""
        self._pending.append((job, end))
        self._wake.set()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, stop_at: float) -> None:
        """Finish the current job, and release all other jobs to the queue.

        The current job gets until SHUTDOWN_MARGIN seconds after `stop_at`, a time of the monotonic clock.
        """
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(max(0.0, stop_at - time.monotonic()) + SHUTDOWN_MARGIN)
        # If the current job is not finished by now, the next start of the server requeues it.
        while self._pending:
            self._queue.release(self._pending.popleft()[0])

    def run_once(self) -> bool:
        """Finish one job; return False if none waits.

        Raises DeviceLost, and DiskFull, after which the next call retries the same job.
        """
        try:
            job, end = self._pending[0]
        except IndexError:
            return False
        # Set this before the job leaves the queue, so that `engines` includes the job's engine at all times.
        self._current = end
        self._pending.popleft()
        try:
            if isinstance(end, RunningJob):
                end = self._outcome(end)
            is_accepted = self._queue.finish(job, end)
        except DiskFull:
            # `end` may be an outcome by now. The retry then does not build it again.
            self._pending.appendleft((job, end))
            raise
        finally:
            self._current = None
        if not is_accepted:
            self._results.discard(end.files)
        # The worker can claim another job now.
        self._notifier.work_available.set()
        return True

    def _outcome(self, running: RunningJob) -> Outcome:
        """Decode and check the images that the worker left to this thread, then encode and store all images.

        Raises DiskFull and DeviceLost; any other error becomes the outcome.
        """
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
                # Clear before the next check: a job that is added after that check sets the event again.
                self._wake.clear()
        except BaseException as error:
            self._on_failure(error)

    def _try_run_once(self) -> bool:
        try:
            return self.run_once()
        except DiskFull as error:
            wait_for_room(error, log, self._wake.wait)
            return True
