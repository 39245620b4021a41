"""The contract between the server and a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from PIL.Image import Image
from pydantic import BaseModel

from models.schema import ImageInput


@dataclass(frozen=True)
class LoadProgress:
    """How far loading has come: the component that is being loaded, bytes so far, and bytes in all."""

    component: str = ""
    loaded_bytes: int = 0
    total_bytes: int = 0


#: Of a request without addresses.
NO_INPUTS: Mapping[str, Path] = MappingProxyType({})


def _ignore(loading: LoadProgress) -> None:
    """What loading reports to when nobody asked."""


@dataclass(frozen=True)
class EngineConfig:
    """What a model is given to set itself up with, chosen by the operator.

    Attributes:
        weights: folder in diffusers layout, or a hub id; None for a model that needs no weights.
        safety_checker: hub id or folder, used when the weights bring no `safety_checker` of their own.
        device: "cuda", "cpu", or "auto" for the best one there is.
        dtype: "bfloat16", "float32", or "auto" for what the device computes fastest in.
        memory: name of a plan in `models.loading.memory_plans`, or "auto" for the fastest that fits.
        max_acceleration: the highest tier that is offered; requests for more get this one.
        is_eager: paint with the very kernels diffusers' own pipeline runs, compiling nothing.
        compile_cache: folder that keeps what was compiled; None for PyTorch's own place.
        report: called before each component is loaded.
    """

    weights: str | Path | None
    safety_checker: str
    device: str = "auto"
    dtype: str = "auto"
    memory: str = "auto"
    max_acceleration: str = "high"
    is_eager: bool = False
    compile_cache: Path | None = None
    report: Callable[[LoadProgress], None] = _ignore


@dataclass(frozen=True)
class ExtraWeights:
    """Further weights that an endpoint needs: in this folder of its own weights, or by this id in the hub's cache."""

    directory: str
    hub_id: str


@dataclass(frozen=True)
class EngineInfo:
    """What an operator is told of an engine.

    Attributes:
        device: its name.
        dtype: the type of number it computes in, by PyTorch's name.
        memory: the memory plan.
        acceleration: the tiers that are ready.
        used_bytes: of the device's memory, by whatever process; None on a CPU.
        total_bytes: of the device's memory; None on a CPU.
    """

    device: str = "cpu"
    dtype: str = ""
    memory: str = ""
    acceleration: tuple[str, ...] = ()
    used_bytes: int | None = None
    total_bytes: int | None = None


class GenerationFailed(Exception):
    """This request fails, for a reason that its client is told. Nothing else is harmed."""


class IncompatibleInput(GenerationFailed):
    """What the request brought along is not for this model; `loc` is the field's place."""

    def __init__(self, loc: tuple[str | int, ...], words: str) -> None:
        super().__init__(words)
        self.loc = loc


class NonFiniteOutput(GenerationFailed):
    """A picture came out as not-a-number, so none is shown."""


class DeviceLost(Exception):
    """The device answers no more in this process: only a new process can paint."""


class GenerationTask(Protocol):
    """One request while it is being painted: one or more pictures, step after step, then decoded."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its pictures, in pixels."""

    @property
    def step(self) -> int:
        """Steps done, over all its pictures."""

    @property
    def num_steps(self) -> int:
        """Steps in all, over all its pictures."""

    @property
    def work(self) -> int:
        """Work done so far, in floating point operations by the closed form."""

    @property
    def remaining_work(self) -> int:
        """Work of the steps still to take, over all its pictures; a step that may be skipped counts as taken."""

    @property
    def images(self) -> Sequence[Image]:
        """The pictures that are decoded, RGB, in order of their seeds."""

    @property
    def acceleration(self) -> str:
        """The tier that paints: "none", "regular" or "high", which may be lower than the one asked for."""

    @property
    def dtype(self) -> str:
        """The type of number it is computed in, by PyTorch's name, such as "bfloat16"."""

    @property
    def is_decoded(self) -> bool:
        """Whether every picture is decoded."""


class Engine(Protocol):
    """A model on its device. One thread owns it; only what is said to run beside may be called from a second one."""

    @property
    def decodes_concurrently(self) -> bool:
        """Whether `decode` and `is_unsafe` may run on another thread than `advance`, and gain from it."""

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> GenerationTask:
        """Begin to paint `request`, an instance of the model's own Input; picture k uses seed + k.

        `inputs` holds what the request's addresses stand for, by the field's place, such as "image_url" or
        "loras.0.path": pictures as RGB files within the limits, LoRA weights as safetensors.
        """

    def advance(self, task: GenerationTask, others: Sequence[GenerationTask] = ()) -> Sequence[GenerationTask]:
        """Take the next step of `task`; returns it and those of `others` that shared the forward.

        Raises GenerationFailed, DeviceLost or what the library raises; it ends this painting and leaves the others as
        they were.
        """

    def preview(self, task: GenerationTask) -> Image | None:
        """What its newest picture looks like at this step, small; None when nothing can be seen yet."""

    def decode(self, task: GenerationTask) -> None:
        """Decode the next picture, once every step was taken. Raises as `advance`; GenerationFailed on not-a-number."""

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        """Say of each picture whether it must not be shown. Raises GenerationFailed when it cannot tell."""

    def info(self) -> EngineInfo:
        """What an operator is told of it, at this moment; called from any thread."""

    def warm_up(self) -> bool:
        """Make one more tier ready, which may take minutes; False when none was left. May run beside.

        One that raises is given up, and is not tried again.
        """

    def close(self) -> None:
        """Give the device's memory back; nothing is called after it."""

    def freeze_compilation(self) -> None:
        """All engines are as ready as they can be: compile nothing from now on."""


class Model(Protocol):
    """One endpoint. A module in `models/` that has an instance of this named MODEL is served."""

    @property
    def endpoint(self) -> str:
        """The endpoint's id on fal, "owner/alias" or "owner/alias/path"."""

    @property
    def family(self) -> str:
        """Endpoints of one family that are given the same weights share one engine."""

    @property
    def weights(self) -> tuple[str, ...]:
        """Hub ids this endpoint can run on; empty for a model that needs no weights."""

    @property
    def extra_weights(self) -> ExtraWeights | None:
        """What must be installed beside the weights for this endpoint to be served; None when nothing."""

    @property
    def Input(self) -> type[ImageInput]:  # noqa: N802  the wire's own word
        """What a request may hold."""

    @property
    def Output(self) -> type[BaseModel]:  # noqa: N802
        """What an answer holds."""

    def setup(self, placement: EngineConfig) -> Engine:
        """Load the weights, on the thread that will own the engine; may take minutes.

        Called for one endpoint of those that share the engine, and again after it was let go for want of memory.
        """

    def build_output(
        self,
        request: Any,
        images: Sequence[Mapping[str, Any]],
        has_nsfw_concepts: Sequence[bool],
        timings: Mapping[str, float],
    ) -> BaseModel:
        """The Output for these stored images, each {url, width, height, content_type}. Timings in seconds."""

    def metadata(self, request: Any, seed: int) -> Mapping[str, Any]:
        """What made one picture, to be written into its file: the same for the same bytes, whatever the load."""
