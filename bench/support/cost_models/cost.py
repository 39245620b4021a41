"""The model bench/cost, whose steps sleep COST seconds for each TFLOP that a step of FLUX.1 [dev] takes."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.base import NO_INPUTS
from models.flux.flops import FLUX_DEV, step_flops
from models.flux.prompt_cache import FLUX_TEXT_TOKENS
from tests.support.fake_models import NullEngine, NullModel, NullTask


def work_of(width: int, height: int) -> int:
    """Return the floating point operations of one step of an image of this size in pixels."""
    return step_flops(FLUX_DEV, width * height // 256, FLUX_TEXT_TOKENS)


def seconds_of(width: int, height: int) -> float:
    """Return the seconds that one step of an image of this size takes."""
    return work_of(width, height) / 1e12 * float(os.environ["COST"])


class CostTask(NullTask):
    """A task that counts its work like a FLUX task, and stores when its last step ends."""

    ends_at = 0.0

    @property
    def work(self) -> int:
        """The work done, in floating point operations."""
        return self.step * self._step_work

    @property
    def remaining_work(self) -> int:
        """The work left, in floating point operations."""
        return int(self.num_steps - self.step) * self._step_work

    @property
    def _step_work(self) -> int:
        size = self.request.image_size
        return work_of(size.width, size.height)


class CostEngine(NullEngine):
    """An engine of an asynchronous device such as a GPU: a step can be launched while the step before it runs."""

    decodes_concurrently = True

    def __init__(self) -> None:
        self._free_at = 0.0

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> CostTask:
        """Start a task like NullEngine does."""
        return CostTask(request, seed)

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        """Launch a step, then wait for the end of the step before it."""
        size, before = task.request.image_size, self._free_at
        self._free_at = max(time.perf_counter(), before) + seconds_of(size.width, size.height)
        task.ends_at = self._free_at
        _sleep_until(before)
        return super().advance(task)

    def decode(self, task: Any) -> None:
        """Wait for the end of the task's last step, then decode."""
        _sleep_until(task.ends_at)
        super().decode(task)


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


MODEL = NullModel("bench/cost", CostEngine)
