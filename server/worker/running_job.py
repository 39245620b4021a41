"""A claimed job and its painting, from the first step to the picture that was judged."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.base import Engine, GenerationFailed, GenerationTask, IncompatibleInput, Model
from server.errors import InternalError, InvalidInput, ServerError
from server.queue.jobs import Job, Outcome
from server.worker.results import GeneratedImages

log = logging.getLogger(__name__)


@dataclass(eq=False)
class RunningJob:
    """One job at work. `must_check` says that its pictures go to the safety checker."""

    job: Job
    model: Model
    engine: Engine
    request: Any
    task: GenerationTask
    needs_safety_check: bool
    #: Spent on its steps and its decoding, in seconds.
    seconds: float = 0.0
    #: What the worker had done in all when this one was claimed.
    claimed_at: int = 0
    flags: Sequence[bool] | None = None

    @property
    def steps_done(self) -> bool:
        """Whether every step was taken."""
        return self.task.step >= self.task.num_steps

    @property
    def is_decoded(self) -> bool:
        """Whether its pictures are decoded and judged."""
        return self.flags is not None

    def decode_next(self) -> None:
        """Decode the next picture; after the last one, judge them all. Raises GenerationFailed."""
        started = time.perf_counter()
        if not self.task.is_decoded:
            self.engine.decode(self.task)
        self.seconds += time.perf_counter() - started
        if self.task.is_decoded:
            self.flags = self._judged() if self.needs_safety_check else [False] * len(self.task.images)

    def _judged(self) -> Sequence[bool]:
        flags = [bool(flag) for flag in self.engine.is_unsafe(self.task.images)]
        if len(flags) != len(self.task.images):
            raise GenerationFailed("The safety checker did not answer for every picture, so none is shown.")
        return flags

    @property
    def result(self) -> GeneratedImages:
        """What it came to, once developed."""
        assert self.flags is not None
        task = self.task
        return GeneratedImages(task.images, self.flags, self.seconds, task.acceleration, task.dtype)


def outcome_from_exception(error: Exception, job: Job) -> Outcome:
    """What the client is told of an error; the operator's log has the rest."""
    if isinstance(error, ServerError):
        return Outcome.from_error(error)
    if isinstance(error, IncompatibleInput):
        entry = {"type": "value_error", "loc": ["body", *error.loc], "msg": str(error), "input": ""}
        return Outcome.from_error(InvalidInput([entry]))
    if isinstance(error, GenerationFailed):
        log.warning("failed: %s", error, extra={"request_id": job.request_id})
        return Outcome.from_error(InternalError(str(error)))
    log.error("failed", exc_info=error, extra={"request_id": job.request_id})
    return Outcome.from_error(InternalError())
