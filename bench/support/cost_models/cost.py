"""bench/cost: paints nothing, and takes the time that FLUX.1 [dev] would, scaled by COST in seconds a TFLOP."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.base import NO_INPUTS
from models.flux.flops import FLUX_DEV, step_flops
from models.flux.prompt_cache import NUM_TOKENS
from tests.support.fake_models import NullEngine, NullModel, NullTask


def work_of(width: int, height: int) -> int:
    """Floating point operations of a step of a picture of this size in pixels."""
    return step_flops(FLUX_DEV, width * height // 256, NUM_TOKENS)


def seconds_of(width: int, height: int) -> float:
    """What such a step takes."""
    return work_of(width, height) / 1e12 * float(os.environ["COST"])


class CostTask(NullTask):
    """Counts its work as the real one does, and knows when its last step ends."""

    ends_at = 0.0

    @property
    def work(self) -> int:
        """In floating point operations."""
        return self.step * self._step_work

    @property
    def remaining_work(self) -> int:
        """In floating point operations."""
        return int(self.num_steps - self.step) * self._step_work

    @property
    def _step_work(self) -> int:
        size = self.request.image_size
        return work_of(size.width, size.height)


class CostEngine(NullEngine):
    """A device that works by itself, as a GPU does: a step is launched while the one before runs, and no earlier."""

    decodes_concurrently = True

    def __init__(self) -> None:
        self._free_at = 0.0

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> CostTask:
        """As NullEngine does."""
        return CostTask(request, seed)

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        """Launch a step, then wait for the end of the one before."""
        size, before = painting.request.image_size, self._free_at
        self._free_at = max(time.perf_counter(), before) + seconds_of(size.width, size.height)
        painting.ends_at = self._free_at
        _sleep_until(before)
        return super().advance(painting)

    def decode(self, painting: Any) -> None:
        """Behind the painting's last step."""
        _sleep_until(painting.ends_at)
        super().decode(painting)


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


MODEL = NullModel("bench/cost", CostEngine)
