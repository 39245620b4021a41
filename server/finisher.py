"""What is left when the steps are done: pictures are encoded, written, and the job is ended."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from models.base import DeviceLost
from server.answers import Answers
from server.errors import DiskFull
from server.jobs import Job, Outcome
from server.notifier import Notifier
from server.queue import Queue
from server.running import Running, failure
from server.watchdog import Watchdog

log = logging.getLogger(__name__)


class Finisher:
    """Ends jobs in the order in which they come, beside the worker's steps."""

    def __init__(
        self,
        queue: Queue,
        answers: Answers,
        notifier: Notifier,
        watchdog: Watchdog,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._queue = queue
        self._answers = answers
        self._notifier = notifier
        self._watchdog = watchdog
        self._on_failure = on_failure
        self._line: deque[tuple[Job, Running | Outcome]] = deque()
        self._bell = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="finisher", daemon=True)

    def __len__(self) -> int:
        """How many jobs wait for their end."""
        return len(self._line)

    def add(self, job: Job, end: Running | Outcome) -> None:
        """A job that is painted, or one whose outcome is known."""
        self._line.append((job, end))
        self._bell.set()

    def start(self) -> None:
        """Work on a thread of its own."""
        self._thread.start()

    def stop(self, stop_at: float) -> None:
        """Return when the job at hand has ended, at the latest at `stop_at`; the rest goes back to the queue."""
        self._is_stopping = True
        self._bell.set()
        if self._thread.is_alive():
            self._thread.join(max(0.0, stop_at - time.monotonic()))
        if not self._thread.is_alive():
            for job, _ in self._line:
                self._queue.give_back(job)

    def turn(self) -> bool:
        """End one job; False when none waits. Raises DiskFull, and goes on with the same job the next time."""
        if not self._line:
            return False
        job, end = self._line[0]
        if isinstance(end, Running):
            end = self._outcome(end)
            # Kept, so that a full disk later on does not have it made again.
            self._line[0] = (job, end)
        is_shown = self._queue.finish(job, end)
        self._line.popleft()
        if not is_shown:
            self._answers.discard(end.files)
        # There is room for another.
        self._notifier.work.set()
        return True

    def _outcome(self, running: Running) -> Outcome:
        """Decoded and judged if that was left to this thread, then encoded and written."""
        try:
            with self._watchdog.over([running.job]):
                while not running.is_developed:
                    running.develop()
            return self._answers.outcome(running.job, running.model, running.request, running.painted)
        except DiskFull:
            raise
        except DeviceLost:
            self._queue.strike([running.job])
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
        except DiskFull:
            log.error("the disk is full; nothing is lost, trying again every second")
            self._bell.wait(1)
            return True
