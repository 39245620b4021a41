"""A claimed job and its generation task, from the first step to the checked images."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.base import Engine, GenerationFailed, GenerationTask, IncompatibleInput, Model
from server.errors import InternalError, InvalidInput, ServerError
from server.queue.jobs import Job, Outcome, Provenance
from server.worker.results import GeneratedImages

log = logging.getLogger(__name__)


@dataclass(eq=False)
class RunningJob:
    """A job in progress. `needs_safety_check` says whether its images go to the safety checker."""

    job: Job
    model: Model
    engine: Engine
    request: Any
    task: GenerationTask
    needs_safety_check: bool
    #: Seconds spent on steps and decoding.
    seconds: float = 0.0
    #: Total work of the scheduler when this job was added.
    claimed_at: int = 0
    #: For each image whether it is unsafe; None until all images are decoded and checked.
    flags: Sequence[bool] | None = None

    @property
    def steps_done(self) -> bool:
        """Whether all steps are done."""
        return self.task.step >= self.task.num_steps

    @property
    def is_decoded(self) -> bool:
        """Whether all images are decoded and checked."""
        return self.flags is not None

    def decode_next(self) -> None:
        """Decode the next image; after the last one, check all images. Raises GenerationFailed and DeviceLost."""
        started = time.perf_counter()
        if not self.task.is_decoded:
            self.engine.decode(self.task)
        self.seconds += time.perf_counter() - started
        if self.task.is_decoded:
            self.flags = self._check_safety() if self.needs_safety_check else [False] * len(self.task.images)

    def _check_safety(self) -> Sequence[bool]:
        flags = [bool(flag) for flag in self.engine.is_unsafe(self.task.images)]
        if len(flags) != len(self.task.images):
            raise GenerationFailed("The safety checker did not check every image, so no image is returned.")
        return flags if self.job.verdict is None else [self.job.verdict] * len(flags)

    @property
    def result(self) -> GeneratedImages:
        """The generated images, once they are decoded and checked."""
        assert self.flags is not None
        task, info = self.task, self.engine.info()
        provenance = Provenance(acceleration=task.acceleration, dtype=task.dtype)
        if info.form:
            provenance["weights"] = info.form
        if info.memory:
            provenance["memory"] = info.memory
        return GeneratedImages(task.images, self.flags, self.seconds, provenance)


def outcome_from_exception(error: Exception, job: Job) -> Outcome:
    """Convert an error into the outcome for the client.

    GenerationFailed and unexpected errors are logged. The client gets no details of an unexpected error.
    """
    if isinstance(error, ServerError):
        return Outcome.from_error(error)
    if isinstance(error, IncompatibleInput):
        return Outcome.from_error(InvalidInput.of("value_error", ("body", *error.loc), str(error)))
    if isinstance(error, GenerationFailed):
        log.warning("the request failed: %s", error, extra={"request_id": job.request_id})
        return Outcome.from_error(InternalError(str(error)))
    log.error("the request failed with an unexpected error", exc_info=error, extra={"request_id": job.request_id})
    return Outcome.from_error(InternalError())
