"""test/faulty: the demo weights, with the fault that the prompt names (see FAULTS) in the second step.

A fault named "NAME once" happens only once, even across restarts: a file in the directory $FAULTS_SEEN records it.
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
from models.flux.loader import load_engine
from models.flux_dev import FluxDev


def _raise(error: Exception) -> Any:
    raise error


def _wait(seconds: float | None = None) -> None:
    threading.Event().wait(seconds)


#: Functions called with the transformer's output; a returned value that is not None replaces the output.
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
#: The prompt whose image is decoded as black pixels.
BLACK = "black"


class FaultyEngine(FluxEngine):
    """The real engine, with hooks on the transformer and the VAE decoder."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        #: The prompt of the task that is in its second step or is being decoded; empty otherwise.
        self._prompt = ""
        self.pipeline.transformer.register_forward_hook(self._spoil_step)
        self.pipeline.vae.decoder.register_forward_hook(self._spoil_image)

    def advance(self, task: Any, others: Sequence[GenerationTask] = ()) -> Sequence[GenerationTask]:
        with self._running(task.request.prompt if task.step == 1 else ""):
            advanced: Sequence[GenerationTask] = super().advance(task, others)
            return advanced

    def decode(self, task: Any) -> None:
        with self._running(task.request.prompt):
            super().decode(task)

    @contextmanager
    def _running(self, prompt: str) -> Iterator[None]:
        self._prompt = prompt
        try:
            yield
        finally:
            self._prompt = ""

    def _spoil_step(self, module: Any, inputs: Any, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        name, once, _ = self._prompt.partition(" once")
        seen = Path(os.environ["FAULTS_SEEN"], name)
        if name not in FAULTS or (once and seen.exists()):
            return output
        seen.touch()
        spoilt = FAULTS[name](output[0])
        return output if spoilt is None else (spoilt,)

    def _spoil_image(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.full_like(output, -1) if self._prompt == BLACK else output


class Faulty(FluxDev):
    """A model with fal-ai/flux/dev's fields on the faulty engine."""

    endpoint = "test/faulty"

    def setup(self, config: EngineConfig) -> FluxEngine:
        if os.environ.get("FAULTS_AT_SETUP"):
            raise OSError("these weights cannot be loaded")
        return load_engine(config, FaultyEngine)


MODEL = Faulty()
