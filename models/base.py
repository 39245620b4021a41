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
    """The progress of loading: the current component, bytes loaded so far, and bytes in total."""

    component: str = ""
    loaded_bytes: int = 0
    total_bytes: int = 0


#: Inputs of a request without URLs.
NO_INPUTS: Mapping[str, Path] = MappingProxyType({})


def _ignore(loading: LoadProgress) -> None:
    """Discard the progress."""


@dataclass(frozen=True)
class EngineConfig:
    """The operator's choices that a model is set up with.

    Attributes:
        weights: directory in diffusers layout, or a hub id; None for a model that needs no weights.
        safety_checker: hub id or directory, used if the weights do not include a `safety_checker`.
        device: "cuda", "cpu", or "auto" for the best one available.
        dtype: "bfloat16", "float32", or "auto" for the type the device is fastest in.
        memory: name of a plan in `models.loading.memory_plans`, or "auto" for the fastest that fits.
        max_acceleration: the highest tier on offer; requests for a higher one get this one.
        is_eager: run the same kernels as diffusers' pipeline, without compiling.
        compile_cache: directory for compiled code; None for PyTorch's default.
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
    """Additional weights of an endpoint: in this subdirectory of its weights, or under this id in the hub cache."""

    directory: str
    hub_id: str


@dataclass(frozen=True)
class EngineInfo:
    """An engine's status for the operator.

    Attributes:
        device: name of the device.
        dtype: the number type of the computation, by PyTorch's name.
        memory: name of the memory plan.
        acceleration: the tiers that are ready.
        used_bytes: device memory in use, by any process; None on a CPU.
        total_bytes: device memory in total; None on a CPU.
    """

    device: str = "cpu"
    dtype: str = ""
    memory: str = ""
    acceleration: tuple[str, ...] = ()
    used_bytes: int | None = None
    total_bytes: int | None = None


class GenerationFailed(Exception):
    """Failure of one request, with a reason for its client. Other requests are unaffected."""


class IncompatibleInput(GenerationFailed):
    """An input that does not fit this model; `loc` is the path of its field."""

    def __init__(self, loc: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.loc = loc


class NonFiniteOutput(GenerationFailed):
    """An image with values that are not numbers, so none is returned."""


class DeviceLost(Exception):
    """Loss of the device in this process: only a new process can generate images."""


class GenerationTask(Protocol):
    """One request during generation: one or more images, which take their steps and are then decoded."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the images, in pixels."""

    @property
    def step(self) -> int:
        """Steps done so far, over all images."""

    @property
    def num_steps(self) -> int:
        """Steps in total, over all images."""

    @property
    def work(self) -> int:
        """Work done so far, in floating point operations by the closed form."""

    @property
    def remaining_work(self) -> int:
        """Work of the remaining steps, over all images; a step that may be skipped counts in full."""

    @property
    def images(self) -> Sequence[Image]:
        """The decoded images, RGB, in order of their seeds."""

    @property
    def acceleration(self) -> str:
        """The tier in use: "none", "regular" or "high"; may be lower than the requested one."""

    @property
    def dtype(self) -> str:
        """The number type of the computation, by PyTorch's name, such as "bfloat16"."""

    @property
    def is_decoded(self) -> bool:
        """Whether every image is decoded."""


class Engine(Protocol):
    """A model on its device. One thread owns it; a second one may call only the methods that say so."""

    @property
    def decodes_concurrently(self) -> bool:
        """Whether `decode` and `is_unsafe` may run on another thread than `advance`, and gain from it."""

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> GenerationTask:
        """Start generating for `request`, an instance of the model's Input; image k uses seed + k.

        `inputs` holds the files behind the request's URLs, by field path, such as "image_url" or "loras.0.path":
        images as RGB files within the limits, LoRA weights as safetensors.
        """

    def advance(self, task: GenerationTask, others: Sequence[GenerationTask] = ()) -> Sequence[GenerationTask]:
        """Take the next step of `task`; return the task and those of `others` that shared the forward.

        Raises GenerationFailed, DeviceLost or an error of the library. An error ends this task and leaves the others
        unchanged.
        """

    def preview(self, task: GenerationTask) -> Image | None:
        """Return a small preview of the newest image at this step; None before there is anything to see."""

    def decode(self, task: GenerationTask) -> None:
        """Decode the next image after all steps. Raises as `advance` does, and GenerationFailed on not-a-number."""

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        """Return for each image whether it is unsafe. Raises GenerationFailed if that cannot be determined."""

    def info(self) -> EngineInfo:
        """Return the current status for the operator; called from any thread."""

    def warm_up(self) -> bool:
        """Make one more tier ready, which may take minutes; return False if none is left.

        May be called from a second thread. A tier that raises is dropped and not tried again.
        """

    def close(self) -> None:
        """Release the device's memory; no other method is called afterwards."""

    def freeze_compilation(self) -> None:
        """Compile nothing from now on; called once all engines have warmed up."""


class Model(Protocol):
    """One endpoint. A module in `models/` is served if it defines an instance named MODEL."""

    @property
    def endpoint(self) -> str:
        """The endpoint's id on fal, "owner/alias" or "owner/alias/path"."""

    @property
    def family(self) -> str:
        """The family: endpoints of one family with the same weights share one engine."""

    @property
    def weights(self) -> tuple[str, ...]:
        """Hub ids this endpoint can run on; empty for a model that needs no weights."""

    @property
    def extra_weights(self) -> ExtraWeights | None:
        """Additional weights that this endpoint needs in order to be served; None if there are none."""

    @property
    def Input(self) -> type[ImageInput]:  # noqa: N802  the wire name
        """The fields of a request."""

    @property
    def Output(self) -> type[BaseModel]:  # noqa: N802
        """The fields of an answer."""

    def setup(self, config: EngineConfig) -> Engine:
        """Load the weights, on the thread that will own the engine; may take minutes.

        Called for one of the endpoints that share the engine, and again if the engine was evicted for lack of memory.
        """

    def build_output(
        self,
        request: Any,
        images: Sequence[Mapping[str, Any]],
        has_nsfw_concepts: Sequence[bool],
        timings: Mapping[str, float],
    ) -> BaseModel:
        """Build the Output for stored images, each {url, width, height, content_type}. Timings are in seconds."""

    def metadata(self, request: Any, seed: int) -> Mapping[str, Any]:
        """Return one image's parameters for its file. Equal bytes have equal parameters, whatever the load."""
