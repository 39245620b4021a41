"""Models without weights, one behaviour each: what the queue, the worker and the wire are tested with."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image as PILImage
from PIL.Image import Image

from models.base import CannotPaint, Placement
from models.flux_dev import MODEL as FLUX_DEV
from models.flux_dev import FluxDevInput, FluxDevOutput


class NullPainting:
    """Plain pictures whose colour is the seed."""

    def __init__(self, request: Any, seed: int) -> None:
        self.request, self.seed = request, seed
        self.step, self.pictures = 0, list[Image]()
        self.acceleration = "none"
        self.num_steps = request.num_inference_steps * request.num_images

    @property
    def is_done(self) -> bool:
        return bool(len(self.pictures) == self.request.num_images)


class NullEngine:
    """Does nothing, at once, then paints."""

    def start(self, request: Any, seed: int) -> NullPainting:
        return NullPainting(request, seed)

    def advance(self, painting: Any) -> None:
        painting.step += 1
        if painting.step % painting.request.num_inference_steps == 0:
            colour = painting.seed + len(painting.pictures)
            size = painting.request.image_size
            painting.pictures.append(PILImage.new("RGB", (size.width, size.height), (colour % 256, 128, 64)))

    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        return [False] * len(pictures)


class GateEngine(NullEngine):
    """Takes each step when a byte is written to the named pipe in the prompt, and all when it is closed."""

    def __init__(self) -> None:
        self._gates: dict[str, int] = {}

    def advance(self, painting: Any) -> None:
        path = painting.request.prompt
        if path not in self._gates:
            self._gates[path] = os.open(path, os.O_RDONLY)
        os.read(self._gates[path], 1)
        super().advance(painting)


class RaisesEngine(NullEngine):
    """Fails in its second step; says why only when the prompt is "told"."""

    def advance(self, painting: Any) -> None:
        if painting.step == 1:
            raise CannotPaint("This cannot be painted.") if painting.request.prompt == "told" else OSError("secret")
        super().advance(painting)


class UnsafeEngine(NullEngine):
    """Its checker flags, answers too little, or raises, as the prompt says."""

    def start(self, request: Any, seed: int) -> NullPainting:
        self._prompt = request.prompt
        return super().start(request, seed)

    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        if self._prompt == "raises":
            raise CannotPaint("The safety checker could not be loaded.")
        return [] if self._prompt == "silent" else [True] * len(pictures)


class NullModel:
    """fal-ai/flux/dev's fields in front of an engine that paints nothing."""

    weights: tuple[str, ...] = ()
    Input = FluxDevInput
    Output = FluxDevOutput

    def __init__(self, endpoint: str, engine: type[NullEngine]) -> None:
        self.endpoint, self._engine = endpoint, engine

    def setup(self, placement: Placement) -> NullEngine:
        return self._engine()

    def answer(
        self,
        request: Any,
        images: Sequence[Mapping[str, Any]],
        has_nsfw_concepts: Sequence[bool],
        timings: Mapping[str, float],
    ) -> FluxDevOutput:
        return FLUX_DEV.answer(request, images, has_nsfw_concepts, timings)

    def parameters(self, request: Any, seed: int) -> Mapping[str, Any]:
        return {**FLUX_DEV.parameters(request, seed), "endpoint": self.endpoint}
