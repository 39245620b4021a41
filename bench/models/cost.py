"""bench/cost: paints nothing, and takes the time that FLUX.1 [dev] would, scaled by COST in seconds a TFLOP."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.base import NO_INPUTS
from models.random_weights import SHAPES
from models.texts import NUM_TOKENS
from models.work import step_flop
from tests.null_model import NullEngine, NullModel, NullPainting

_SHAPE = {
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "in_channels": 64,
    "out_channels": None,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    **SHAPES["full"]["transformer"],
}


def seconds_of(width: int, height: int) -> float:
    """A step of a picture of this size in pixels."""
    return step_flop(_SHAPE, width * height // 256, NUM_TOKENS) / 1e12 * float(os.environ["COST"])


class CostPainting(NullPainting):
    """Counts its work as the real one does."""

    @property
    def work(self) -> float:
        """In seconds, which go with floating point operations."""
        size = self.request.image_size
        return self.step * seconds_of(size.width, size.height)


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
