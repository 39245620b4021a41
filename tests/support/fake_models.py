"""Models without weights, one behaviour each, for tests of the queue, the worker and the HTTP API."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from PIL.Image import Image

from models.base import NO_INPUTS, DeviceLost, EngineConfig, EngineInfo, GenerationFailed, LoadProgress
from models.flux_dev import FluxDev, FluxDevInput, FluxDevOutput
from models.schema import ImageInput


class NullTask:
    """A task whose images are plain, with a colour that depends on the seed."""

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
    """An engine whose steps do nothing and take no time; it decodes plain images."""

    decodes_concurrently = False

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullTask:
        return NullTask(request, seed)

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        task.step += 1
        return [task]

    def preview(self, task: Any) -> Image | None:
        return PILImage.new("RGB", (16, 12), (task.seed % 256, task.step * 20 % 256, 64))

    def decode(self, task: Any) -> None:
        colour = task.seed + len(task.images)
        size = task.request.image_size
        task.images.append(PILImage.new("RGB", (size.width, size.height), (colour % 256, 128, 64)))

    def info(self) -> EngineInfo:
        left_out = ("acceleration high: a test",)
        return EngineInfo("nothing", "float32", "none at all", ("none",), 1_000, 4_000, left_out, "as fast as nothing")

    def warm_up(self) -> bool:
        return False

    def freeze_compilation(self) -> None:
        return None

    def close(self) -> None:
        return None

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        return [False] * len(images)


class GateEngine(NullEngine):
    """An engine that takes a step for each byte in the named pipe that the prompt names, or if the pipe is closed."""

    def __init__(self) -> None:
        self._gates: dict[str, int] = {}

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        path = task.request.prompt
        if path not in self._gates:
            self._gates[path] = os.open(path, os.O_RDONLY)
        os.read(self._gates[path], 1)
        return super().advance(task)


class SharingEngine(NullEngine):
    """An engine whose tasks share every forward: each step advances all tasks that it gets."""

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        return [advanced for each in (task, *others) for advanced in super(SharingEngine, self).advance(each)]


class MemoryEngine(NullEngine):
    """An engine that runs out of memory in each step."""

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        raise GenerationFailed("Out of memory: an image of 512x512 did not fit, also when tried alone.")


class LostEngine(NullEngine):
    """An engine that loses its device in the second step while the file in the prompt exists."""

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        if task.step == 1 and Path(task.request.prompt).exists():
            raise DeviceLost("an illegal memory access was encountered")
        return super().advance(task)


class LargePreviewEngine(GateEngine):
    """A gate engine with previews of several megabytes, which soon fill every buffer."""

    def __init__(self) -> None:
        super().__init__()
        self._noise = PILImage.effect_noise((1600, 1600), 100).convert("RGB")

    def preview(self, task: Any) -> Image | None:
        return self._noise


class CopyEngine(NullEngine):
    """An engine whose output is the input image."""

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullTask:
        task = NullTask(request, seed)
        self._source = inputs["image_url"]
        return task

    def decode(self, task: Any) -> None:
        with PILImage.open(self._source) as image:
            image.load()
        task.images.append(image)


class InpaintEngine(NullEngine):
    """An engine whose output is the input image, red where the mask is white."""

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullTask:
        self._inputs = inputs
        return NullTask(request, seed)

    def decode(self, task: Any) -> None:
        with PILImage.open(self._inputs["image_url"]) as image, PILImage.open(self._inputs["mask_url"]) as mask:
            image.paste((255, 0, 0), mask=mask.convert("L").resize(image.size))
        size = task.request.image_size
        task.images.append(image.resize((size.width, size.height)) if size else image)


class RaisesEngine(NullEngine):
    """An engine that fails in the second step. The error has a message for the client only if the prompt is "told"."""

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        if task.step == 1:
            raise (GenerationFailed("This cannot be painted.") if task.request.prompt == "told" else OSError("secret"))
        return super().advance(task)


class UnsafeEngine(NullEngine):
    """An engine whose safety checker flags all images, raises for the prompt "raises", or returns [] for "silent"."""

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullTask:
        self._prompt = request.prompt
        return super().start(request, seed)

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        if self._prompt == "raises":
            raise GenerationFailed("The safety checker could not be loaded.")
        return [] if self._prompt == "silent" else [True] * len(images)


class SlowCheckEngine(NullEngine):
    """An engine whose checker waits for a byte in the named pipe that the prompt names, then flags every image."""

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> NullTask:
        self._gate = request.prompt
        return super().start(request, seed)

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        with Path(self._gate).open("rb", buffering=0) as gate:
            gate.read(1)
        return [True] * len(images)


class NullModel:
    """A model with the fields of fal-ai/flux/dev and an engine without weights."""

    family = "null"
    weights: tuple[str, ...] = ()
    extra_weights = ()
    Input: type[ImageInput] = FluxDevInput
    Output = FluxDevOutput

    def __init__(self, endpoint: str, engine: Callable[[], NullEngine]) -> None:
        self.endpoint, self._engine = endpoint, engine

    def setup(self, config: EngineConfig) -> NullEngine:
        return self._engine()

    def build_output(
        self,
        request: Any,
        images: Sequence[Mapping[str, Any]],
        has_nsfw_concepts: Sequence[bool],
        timings: Mapping[str, float],
    ) -> FluxDevOutput:
        return FluxDev().build_output(request, images, has_nsfw_concepts, timings)

    def metadata(self, request: Any, seed: int) -> Mapping[str, Any]:
        return {**FluxDev().metadata(request, seed), "endpoint": self.endpoint}


class LoadingModel(NullModel):
    """A model that reports two components and waits for a byte from the named pipe before it loads the second."""

    def __init__(self, endpoint: str, gate: str) -> None:
        super().__init__(endpoint, NullEngine)
        self._gate = gate

    def setup(self, config: EngineConfig) -> NullEngine:
        config.report(LoadProgress("text_encoder", 0, 4_000_000_000))
        config.report(LoadProgress("transformer", 1_000_000_000, 4_000_000_000))
        with Path(self._gate).open("rb", buffering=0) as gate:
            gate.read(1)
        return super().setup(config)
