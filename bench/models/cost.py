"""bench/cost: paints nothing, and takes the time that FLUX.1 [dev] would, scaled by COST in seconds a TFLOP."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.base import NO_INPUTS
from models.texts import NUM_TOKENS
from models.work import FLUX_DEV, step_flop
from tests.null_model import NullEngine, NullModel, NullPainting


def work_of(width: int, height: int) -> int:
    """Floating point operations of a step of a picture of this size in pixels."""
    return step_flop(FLUX_DEV, width * height // 256, NUM_TOKENS)


def seconds_of(width: int, height: int) -> float:
    """What such a step takes."""
    return work_of(width, height) / 1e12 * float(os.environ["COST"])


class CostPainting(NullPainting):
    """Counts its work as the real one does."""

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
    """Each step takes its time."""

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> CostPainting:
        """As NullEngine does."""
        return CostPainting(request, seed)

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        """Sleep."""
        size = painting.request.image_size
        time.sleep(seconds_of(size.width, size.height))
        return super().advance(painting)


MODEL = NullModel("bench/cost", CostEngine)
