"""test/faulty: the demo weights, in whose second step goes wrong what the prompt names: see FAULTS.

"NAME once" happens once ever, which the folder in the environment's FAULTS_SEEN remembers.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from models.base import EngineConfig, GenerationTask
from models.flux.engine import FluxEngine
from models.flux_dev import FluxDev


def _raise(error: Exception) -> Any:
    raise error


def _wait(seconds: float | None = None) -> None:
    threading.Event().wait(seconds)


#: What happens when the transformer is done; what is returned takes the place of its output.
FAULTS: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "slow": lambda output: _wait(0.05),
    "raises": lambda output: _raise(OSError("secret")),
    "out of memory": lambda output: _raise(torch.OutOfMemoryError("it was said")),
    "exhausts": lambda output: bytes(2**60),
    "poisoned": lambda output: _raise(torch.AcceleratorError("an illegal memory access was encountered")),
    "hangs": lambda output: _wait(),
    "exits": lambda output: os._exit(5),
    "nan": lambda output: output * float("nan"),
}
#: What goes wrong only as it is decoded.
BLACK = "black"


class FaultyEngine(FluxEngine):
    """The real one, with its parts hooked."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        #: The prompt of what is in its second step, or is decoded.
        self._prompt = ""
        self.pipeline.transformer.register_forward_hook(self._spoil_step)
        self.pipeline.vae.decoder.register_forward_hook(self._spoil_picture)

    def advance(self, painting: Any, others: Sequence[GenerationTask] = ()) -> Sequence[GenerationTask]:
        with self._at(painting.request.prompt if painting.step == 1 else ""):
            advanced: Sequence[GenerationTask] = super().advance(painting, others)
            return advanced

    def decode(self, painting: Any) -> None:
        with self._at(painting.request.prompt):
            super().decode(painting)

    @contextmanager
    def _at(self, prompt: str) -> Iterator[None]:
        self._prompt = prompt
        try:
            yield
        finally:
            self._prompt = ""

    def _spoil_step(self, module: Any, given: Any, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        name, once, _ = self._prompt.partition(" once")
        seen = Path(os.environ["FAULTS_SEEN"], name)
        if name not in FAULTS or (once and seen.exists()):
            return output
        seen.touch()
        spoilt = FAULTS[name](output[0])
        return output if spoilt is None else (spoilt,)

    def _spoil_picture(self, module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.full_like(output, -1) if self._prompt == BLACK else output


class Faulty(FluxDev):
    """fal-ai/flux/dev's fields in front of it."""

    endpoint = "test/faulty"

    def setup(self, placement: EngineConfig) -> FluxEngine:
        if os.environ.get("FAULTS_AT_SETUP"):
            raise OSError("these weights cannot be loaded")
        return FaultyEngine.load(placement)


MODEL = Faulty()
