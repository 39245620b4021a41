"""Models without weights, one behaviour each: what the queue, the worker and the wire are tested with."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from PIL.Image import Image

from models.base import NO_INPUTS, DeviceLost, EngineConfig, EngineInfo, GenerationFailed, LoadProgress
from models.flux_dev import MODEL as FLUX_DEV
from models.flux_dev import FluxDevInput, FluxDevOutput
from models.schema import ImageInput


class NullTask:
    """Plain pictures whose colour is the seed."""

    def __init__(self, request: Any, seed: int) -> None:
        self.request, self.seed = request, seed
        self.step, self.images = 0, list[Image]()
        self.acceleration, self.dtype = "none", "float32"
        self.num_steps = request.num_inference_steps * request.num_images

    @property
    def size(self) -> tuple[int, int]:
        size = getattr(self.request, "image_size", None)
        return (size.width, size.height) if size else (64, 64)

    @property
    def work(self) -> int:
        return int(self.step)

    @property
    def remaining_work(self) -> int:
        return int(self.num_steps - self.step)

    @property
    def is_decoded(self) -> bool:
        return bool(len(self.images) == self.request.num_images)


class NullEngine:
    """Does nothing, at once, then paints."""

    decodes_concurrently = False

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullTask:
        return NullTask(request, seed)

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        painting.step += 1
        return [painting]

    def preview(self, painting: Any) -> Image | None:
        return PILImage.new("RGB", (16, 12), (painting.seed % 256, painting.step * 20 % 256, 64))

    def decode(self, painting: Any) -> None:
        colour = painting.seed + len(painting.images)
        size = painting.request.image_size
        painting.images.append(PILImage.new("RGB", (size.width, size.height), (colour % 256, 128, 64)))

    def info(self) -> EngineInfo:
        return EngineInfo("nothing", "float32", "none at all", ("none",), 1_000, 4_000)

    def warm_up(self) -> bool:
        return False

    def freeze_compilation(self) -> None:
        return None

    def close(self) -> None:
        return None

    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        return [False] * len(pictures)


class GateEngine(NullEngine):
    """Takes each step when a byte is written to the named pipe in the prompt, and all when it is closed."""

    def __init__(self) -> None:
        self._gates: dict[str, int] = {}

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        path = painting.request.prompt
        if path not in self._gates:
            self._gates[path] = os.open(path, os.O_RDONLY)
        os.read(self._gates[path], 1)
        return super().advance(painting)


class SharingEngine(NullEngine):
    """Takes everybody along in each step."""

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        return [member for each in (painting, *others) for member in super(SharingEngine, self).advance(each)]


class MemoryEngine(NullEngine):
    """Has no room for any picture."""

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        raise GenerationFailed("Out of memory: a picture of 512x512 did not fit, also when tried alone.")


class LostEngine(NullEngine):
    """Loses the device in its second step, as long as the file in the prompt is there."""

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        if painting.step == 1 and Path(painting.request.prompt).exists():
            raise DeviceLost("an illegal memory access was encountered")
        return super().advance(painting)


class LargePreviewEngine(GateEngine):
    """The gate again, with previews of megabytes that no buffer holds many of."""

    def __init__(self) -> None:
        super().__init__()
        self._noise = PILImage.effect_noise((1600, 1600), 100).convert("RGB")

    def preview(self, painting: Any) -> Image | None:
        return self._noise


class CopyEngine(NullEngine):
    """Paints what it is given."""

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullTask:
        painting = NullTask(request, seed)
        self._source = inputs["image_url"]
        return painting

    def decode(self, painting: Any) -> None:
        with PILImage.open(self._source) as picture:
            picture.load()
        painting.images.append(picture)


class RaisesEngine(NullEngine):
    """Fails in its second step; says why only when the prompt is "told"."""

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        if painting.step == 1:
            raise (
                GenerationFailed("This cannot be painted.") if painting.request.prompt == "told" else OSError("secret")
            )
        return super().advance(painting)


class UnsafeEngine(NullEngine):
    """Its checker flags, answers too little, or raises, as the prompt says."""

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullTask:
        self._prompt = request.prompt
        return super().start(request, seed)

    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        if self._prompt == "raises":
            raise GenerationFailed("The safety checker could not be loaded.")
        return [] if self._prompt == "silent" else [True] * len(pictures)


class SlowCheckEngine(NullEngine):
    """Its checker waits for a byte from the named pipe in the prompt, and flags."""

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullTask:
        self._gate = request.prompt
        return super().start(request, seed)

    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        with Path(self._gate).open("rb", buffering=0) as gate:
            gate.read(1)
        return [True] * len(pictures)


class NullModel:
    """fal-ai/flux/dev's fields in front of an engine that paints nothing."""

    family = "null"
    weights: tuple[str, ...] = ()
    extra_weights = None
    Input: type[ImageInput] = FluxDevInput
    Output = FluxDevOutput

    def __init__(self, endpoint: str, engine: Callable[[], NullEngine]) -> None:
        self.endpoint, self._engine = endpoint, engine

    def setup(self, placement: EngineConfig) -> NullEngine:
        return self._engine()

    def build_output(
        self,
        request: Any,
        images: Sequence[Mapping[str, Any]],
        has_nsfw_concepts: Sequence[bool],
        timings: Mapping[str, float],
    ) -> FluxDevOutput:
        return FLUX_DEV.build_output(request, images, has_nsfw_concepts, timings)

    def metadata(self, request: Any, seed: int) -> Mapping[str, Any]:
        return {**FLUX_DEV.metadata(request, seed), "endpoint": self.endpoint}


class LoadingModel(NullModel):
    """Tells of two components, and waits for a byte from the named pipe before the second is loaded."""

    def __init__(self, endpoint: str, gate: str) -> None:
        super().__init__(endpoint, NullEngine)
        self._gate = gate

    def setup(self, placement: EngineConfig) -> NullEngine:
        placement.report(LoadProgress("text_encoder", 0, 4_000_000_000))
        placement.report(LoadProgress("transformer", 1_000_000_000, 4_000_000_000))
        with Path(self._gate).open("rb", buffering=0) as gate:
            gate.read(1)
        return super().setup(placement)
