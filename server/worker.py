"""Claim, advance the engine, check, save, finish: one thread that owns the models."""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.base import CannotPaint, Engine, Model, Painting, Placement
from server import wire
from server.answers import Answers, Painted
from server.errors import ClientCancelled, DiskFull, InternalError, NotFound, ServerError
from server.files import Files
from server.jobs import Job, Outcome, Priority
from server.notifier import WORKER, Notifier
from server.queue import Queue
from server.settings import Settings

log = logging.getLogger(__name__)


@dataclass
class Running:
    """A claimed job and its painting."""

    job: Job
    model: Model
    request: Any
    painting: Painting
    seconds: float = 0.0
    last_turn: int = 0


class Worker:
    """Paints what the queue holds. `turn` does one piece of work, so tests need no thread."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Model],
        placements: Mapping[str, Placement],
        queue: Queue,
        files: Files,
        notifier: Notifier,
    ) -> None:
        self._settings = settings
        self._models = models
        self._placements = placements
        self._queue = queue
        self._answers = Answers(files, embeds_parameters=settings.embed_parameters)
        self._notifier = notifier
        self._engines: dict[str, Engine] = {}
        self._running: list[Running] = []
        #: Jobs that have ended and wait to be written down.
        self._ended: deque[tuple[Job, Outcome]] = deque()
        self._turn = 0
        self._stop_at: float | None = None
        self.is_ready = False
        #: Why the thread ended, if it ended by itself.
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        """Begin to load the models, then to paint."""
        self._thread.start()

    def stop(self) -> None:
        """Claim nothing more; finish what runs within the grace, give the rest back; then return."""
        was_ready, self.is_ready = self.is_ready, False
        self._stop_at = self._stop_at or time.monotonic() + self._settings.shutdown_grace
        self._notifier.work.set()
        # Loading cannot be interrupted and has nothing to lose; a single step may outlast the grace.
        if was_ready:
            self._thread.join(self._settings.shutdown_grace + 5)

    def setup(self) -> None:
        """Load every model that is served. Raises what the first bad one raises."""
        for endpoint, placement in self._placements.items():
            self._engines[endpoint] = self._models[endpoint].setup(placement)
        self.is_ready = True

    def turn(self) -> bool:
        """Claim what there is room for, take one step of one painting; False when there was nothing to do.

        Raises DiskFull; nothing is lost then, and the next turn goes on where this one stopped.
        """
        self._settle()
        self._claim()
        if self._running:
            running = min(self._running, key=_urgency)
            self._turn += 1
            running.last_turn = self._turn
            outcome = wire.outcome_of(ClientCancelled()) if running.job.is_cancelled else self._advance(running)
            if outcome is not None:
                self._running.remove(running)
                self._ended.append((running.job, outcome))
        elif not self._ended:
            return False
        self._settle()
        return True

    def _run(self) -> None:
        try:
            self.setup()
            log.info("ready: %s", ", ".join(self._engines))
            while self._is_wanted():
                if not self._try_turn():
                    self._notifier.work.wait()
                    self._notifier.work.clear()
            for running in self._running:
                self._queue.give_back(running.job)
        except BaseException as error:
            # What an operator can mend is said in a line; for the rest the trace is wanted.
            log.error("the worker stopped: %s", error, exc_info=None if isinstance(error, OSError) else error)
            self.failure = error
            self._notifier.ring(WORKER)

    def _try_turn(self) -> bool:
        try:
            return self.turn()
        except DiskFull:
            log.error("the disk is full; nothing is lost, trying again every second")
            self._notifier.work.wait(1)
            return True

    def _is_wanted(self) -> bool:
        if self._stop_at is None:
            return True
        return bool(self._running or self._ended) and time.monotonic() < self._stop_at

    def _claim(self) -> None:
        while self._stop_at is None and len(self._running) + len(self._ended) < self._settings.max_running:
            claimed = self._queue.claim()
            if claimed is None:
                return
            job, text = claimed
            try:
                self._running.append(self._begin(job, text))
            except Exception as error:
                self._ended.append((job, wire.outcome_of(_told(error, job))))

    def _begin(self, job: Job, text: str) -> Running:
        if job.endpoint not in self._engines:
            raise NotFound(f"{job.endpoint} is not served here any more")
        model = self._models[job.endpoint]
        # No limits: what was accepted stays accepted, whatever the settings are by now.
        request = model.Input.model_validate_json(text)
        painting = self._engines[job.endpoint].start(request, request.seed or 0)
        # Behind those of this round: a stream of short requests must not keep a long one waiting for ever.
        return Running(job, model, request, painting, last_turn=self._turn)

    def _advance(self, running: Running) -> Outcome | None:
        """One step; the outcome when it was the last, or when it failed."""
        job, painting = running.job, running.painting
        begun = time.perf_counter()
        try:
            # Done already when its pictures found no room on the disk the last time.
            if not painting.is_done:
                self._engines[job.endpoint].advance(painting)
                running.seconds += time.perf_counter() - begun
                self._queue.progress(job, painting.step, painting.num_steps)
            if not painting.is_done or job.is_cancelled:
                return None
            painted = Painted(painting.pictures, self._flags(running), running.seconds, painting.acceleration)
            return self._answers.outcome(job, running.model, running.request, painted)
        except DiskFull:
            raise
        except Exception as error:
            return wire.outcome_of(_told(error, job))

    def _flags(self, running: Running) -> Sequence[bool]:
        found = running.painting.pictures
        if not (running.request.enable_safety_checker or self._settings.enforce_safety_checker):
            return [False] * len(found)
        flags = self._engines[running.job.endpoint].is_unsafe(found)
        if len(flags) != len(found):
            raise CannotPaint("The safety checker did not answer for every picture, so none is shown.")
        return [bool(flag) for flag in flags]

    def _settle(self) -> None:
        """Write down how jobs ended."""
        while self._ended:
            job, outcome = self._ended[0]
            is_shown = self._queue.finish(job, outcome)
            self._ended.popleft()
            if not is_shown:
                self._answers.discard(outcome.files)


def _urgency(running: Running) -> tuple[bool, bool, int, int]:
    """Who is next: the cancelled to be gone, then normal priority, then who has waited longest, then the oldest.

    Going round lets nobody starve: a long request gets its turn however many short ones come and go.
    """
    job = running.job
    return (not job.is_cancelled, job.priority == Priority.LOW, running.last_turn, job.sequence)


def _told(error: Exception, job: Job) -> ServerError:
    """What the client is told of a failure; the operator's log has the rest."""
    if isinstance(error, ServerError):
        return error
    if isinstance(error, CannotPaint):
        log.warning("request %s failed: %s", job.request_id, error)
        return InternalError(str(error))
    log.error("request %s failed", job.request_id, exc_info=error)
    return InternalError()
