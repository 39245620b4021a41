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
from server.worker.interfaces import JobSource
from server.worker.results import Answers
from server.worker.running_job import Running, failure
from server.worker.watchdog import Watchdog

log = logging.getLogger(__name__)


#: Seconds beyond the grace: enough to encode and write a picture, so that only its decoding is given up.
LAST_MOMENT = 1.0


class Finisher:
    """Ends jobs in the order in which they come, beside the worker's steps."""

    def __init__(
        self,
        queue: JobSource,
        answers: Answers,
        notifier: Notifier,
        watchdog: Watchdog,
        on_failure: Callable[[BaseException], None],
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._queue = queue
        self._answers = answers
        self._notifier = notifier
        self._watchdog = watchdog
        self._on_failure = on_failure
        self._line: deque[tuple[Job, Running | Outcome]] = deque()
        self._at_hand: Running | Outcome | None = None
        self._bell = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="finisher", daemon=True)

    def __len__(self) -> int:
        """How many jobs wait for their end."""
        return len(self._line) + (self._at_hand is not None)

    @property
    def engines(self) -> set[Engine]:
        """Those that still have something to decode or to judge here."""
        ends = [self._at_hand, *(end for _, end in tuple(self._line))]
        return {end.engine for end in ends if isinstance(end, Running)}

    def add(self, job: Job, end: Running | Outcome) -> None:
        """A job that is painted, or one whose outcome is known."""
        self._line.append((job, end))
        self._bell.set()

    def start(self) -> None:
        """Work on a thread of its own."""
        self._thread.start()

    def stop(self, stop_at: float) -> None:
        """Return when the job at hand has ended, or soon after `stop_at`; the rest goes back to the queue."""
        self._is_stopping = True
        self._bell.set()
        if self._thread.is_alive():
            self._thread.join(max(0.0, stop_at - time.monotonic()) + LAST_MOMENT)
        # What is at hand still is left to the next start.
        while self._line:
            self._queue.release(self._line.popleft()[0])

    def turn(self) -> bool:
        """End one job; False when none waits. Raises DiskFull, and goes on with the same job the next time."""
        try:
            job, end = self._line[0]
        except IndexError:
            return False
        # In this order, so that its engine is never seen as idle.
        self._at_hand = end
        self._line.popleft()
        try:
            if isinstance(end, Running):
                end = self._outcome(end)
            is_shown = self._queue.finish(job, end)
        except DiskFull:
            # With its outcome, if it has one: it is not made again.
            self._line.appendleft((job, end))
            raise
        finally:
            self._at_hand = None
        if not is_shown:
            self._answers.discard(end.files)
        # There is room for another.
        self._notifier.work_available.set()
        return True

    def _outcome(self, running: Running) -> Outcome:
        """Decoded and judged if that was left to this thread, then encoded and written."""
        try:
            with self._watchdog.over([running.job]):
                while not running.is_developed:
                    if running.job.is_cancelled:
                        return Outcome.from_error(ClientCancelled())
                    running.develop()
            outcome = self._answers.outcome(running.job, running.model, running.request, running.painted)
            self._metrics.count_images(running.job.endpoint, len(running.painted.pictures), sum(running.painted.flags))
            return outcome
        except DiskFull:
            raise
        except DeviceLost:
            self._queue.record_crash([running.job])
            raise
        except Exception as error:
            return failure(error, running.job)

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                if not self._try_turn():
                    self._bell.wait()
                # Before the next look at anything: what rings after it is heard by the next wait.
                self._bell.clear()
        except BaseException as error:
            self._on_failure(error)

    def _try_turn(self) -> bool:
        try:
            return self.turn()
        except DiskFull as error:
            log.error("%s; nothing is lost, trying again every second", error)
            self._bell.wait(1)
            return True
