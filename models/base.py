"""The contract between the server and a model."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from PIL.Image import Image
from pydantic import BaseModel

from models.schema import ImageInput


@dataclass(frozen=True)
class LoadProgress:
    """The progress of loading weights: the current component, the bytes loaded before it, and the bytes in total."""

    component: str = ""
    loaded_bytes: int = 0
    total_bytes: int = 0


#: The input files of a request without URLs.
NO_INPUTS: Mapping[str, Path] = MappingProxyType({})


def _ignore(loading: LoadProgress) -> None:
    """Ignore the progress of loading."""


@dataclass(frozen=True)
class ExtraWeights:
    """The additional weights that an endpoint needs.

    Attributes:
        directory: the subdirectory that holds them, if the endpoint's own weights are a local directory.
        hub_id: their hub id, if the endpoint's own weights come from the hub.
        is_lora: whether they are a LoRA, a single safetensors file without a configuration.
    """

    directory: str
    hub_id: str
    is_lora: bool = False


@dataclass(frozen=True)
class SingleFile:
    """Weights in a single file, and the base that gives the components and configurations that the file lacks.

    Attributes:
        file: a safetensors or GGUF file (Path), or its place on the hub (str), such as "owner/name/file.gguf".
        base: a directory in diffusers layout (Path) or a hub id (str).
    """

    file: str | Path
    base: str | Path

    def __str__(self) -> str:
        return str(self.file)


#: A directory in diffusers layout (Path), a hub id (str), or a single file.
Weights = str | Path | SingleFile


@dataclass(frozen=True)
class EngineConfig:
    """The operator's settings for loading and running a model.

    Attributes:
        weights: the weights; None for a model that needs none.
        safety_checker: a hub id or directory, used if the weights have no subdirectory `safety_checker`.
        device: "cuda", "cpu", or "auto" for a GPU if PyTorch can use one, else the CPU.
        dtype: "bfloat16", "float32", or "auto": float32 on a CPU that is slow in bfloat16 but has the memory, else
            bfloat16.
        memory: the name of a plan in `models.loading.memory_plans`, or "auto" for the first that fits.
        quantize: the form to which weights may be rounded at load: "none", "fp8", "int8", "int4", or "auto" for any.
        kernels_allow: the repositories on the hub whose kernels, which are code, may be loaded.
        max_acceleration: the highest acceleration tier to offer; a request for a higher tier runs at most at this tier.
        is_eager: whether to compile nothing and run the same kernels as diffusers' pipeline.
        compile_cache: the directory for compiled code; None for PyTorch's default.
        extra_weights: the additional weights that the engine's endpoints need.
        report: called with the progress before each component that has weights is loaded.
    """

    weights: Weights | None
    safety_checker: str
    device: str = "auto"
    dtype: str = "auto"
    memory: str = "auto"
    quantize: str = "auto"
    kernels_allow: Collection[str] = ()
    max_acceleration: str = "high"
    is_eager: bool = False
    compile_cache: Path | None = None
    extra_weights: Collection[ExtraWeights] = ()
    report: Callable[[LoadProgress], None] = _ignore


@dataclass(frozen=True)
class EngineInfo:
    """The status of an engine, for the operator.

    Attributes:
        device: the name of the device.
        dtype: the number type of the computation, by PyTorch's name.
        memory: the name of the memory plan.
        acceleration: the tiers that requests can use now.
        form: the form of the transformer's weights in their files, such as "safetensors" or "GGUF Q4_0".
        unavailable: the tiers, and the ways to run them, that do not work on this device, each with the reason.
        used_bytes: the device memory in use by all processes; None on a CPU.
        total_bytes: the device memory in total; None on a CPU.
        way: how the transformer runs, such as "compiled with the fastest attention" or "uncompiled, because ...".
    """

    device: str = "cpu"
    dtype: str = ""
    memory: str = ""
    acceleration: tuple[str, ...] = ()
    used_bytes: int | None = None
    total_bytes: int | None = None
    unavailable: tuple[str, ...] = ()
    way: str = ""
    form: str = ""


class GenerationFailed(Exception):
    """A failure of one request; the message is shown to its client. Other requests are unaffected."""


class IncompatibleInput(GenerationFailed):
    """An input file that does not fit this model. `loc` is the path of its field, such as ("loras", 0, "path")."""

    def __init__(self, loc: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.loc = loc


class NonFiniteOutput(GenerationFailed):
    """A generated image with infinite or not-a-number values; the image is not returned."""


class DeviceLost(Exception):
    """A device that this process can no longer use: only a new process can generate images."""


class GenerationTask(Protocol):
    """A request during generation: one or more images, each of which takes its steps and is then decoded."""

    @property
    def size(self) -> tuple[int, int]:
        """The width and height of the images, in pixels."""

    @property
    def step(self) -> int:
        """The number of steps done so far, over all images."""

    @property
    def num_steps(self) -> int:
        """The number of steps in total, over all images."""

    @property
    def work(self) -> int:
        """The work of the steps done so far, over all images: floating point operations, calculated, not measured."""

    @property
    def remaining_work(self) -> int:
        """The work of the remaining steps, over all images. A block counts even if its step may skip it."""

    @property
    def images(self) -> Sequence[Image]:
        """The images decoded so far, in RGB, in the order of their seeds."""

    @property
    def acceleration(self) -> str:
        """The tier in use, "none", "regular" or "high"; it may be lower than the requested one."""

    @property
    def dtype(self) -> str:
        """The number type of the computation, by PyTorch's name, such as "bfloat16"."""

    @property
    def is_decoded(self) -> bool:
        """Whether every image is decoded."""


class Engine(Protocol):
    """A model loaded on a device. One thread makes all calls, except where a description below allows another."""

    @property
    def decodes_concurrently(self) -> bool:
        """Whether `decode` and `is_unsafe` should run on a second thread while `advance` runs on the first."""

    def start(self, request: Any, seed: int, inputs: Mapping[str, Path] = NO_INPUTS) -> GenerationTask:
        """Create the task of `request`, an instance of the model's Input. Image k, counted from 0, uses seed + k.

        `inputs` holds the files behind the request's URLs, by field path, such as "image_url" or "loras.0.path":
        images as RGB PNGs within the operator's size limits, LoRA weights as safetensors. Raises GenerationFailed if
        this engine cannot run the request.
        """

    def advance(self, task: GenerationTask, others: Sequence[GenerationTask] = ()) -> Sequence[GenerationTask]:
        """Take the next step of `task` and of those `others` that share its forward; return the tasks that took a step.

        Raises GenerationFailed, DeviceLost or an error of the library. After an error, `task` must not be continued;
        the other tasks may go on, unless the device is lost.
        """

    def preview(self, task: GenerationTask) -> Image | None:
        """Return a small preview of the newest image as of the last step; None before the first step."""

    def decode(self, task: GenerationTask) -> None:
        """Decode the next image; called once all steps are done. Raises NonFiniteOutput and the errors of `advance`."""

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        """Return for each image whether it is unsafe. Raises GenerationFailed if the checker cannot decide."""

    def info(self) -> EngineInfo:
        """Return the current status for the operator. May be called from any thread."""

    def warm_up(self) -> bool:
        """Make one more tier, or what else gets faster, ready, which may take minutes; return False if all was ready.

        May be called from a second thread. Raises the error of a tier that cannot be made ready, and drops the tier.
        """

    def close(self) -> None:
        """Release the device memory. No other method may be called afterwards."""

    def freeze_compilation(self) -> None:
        """Stop compiling; called when all loaded engines have warmed up. May be called from a second thread."""


class Model(Protocol):
    """An endpoint: an instance that a module in `models/` or --models-dir names MODEL, or has in its tuple MODELS."""

    @property
    def endpoint(self) -> str:
        """The endpoint's id, as on fal: "owner/alias" or "owner/alias/path"."""

    @property
    def family(self) -> str:
        """The name of the family: endpoints of one family that use the same weights share one engine."""

    @property
    def weights(self) -> tuple[str, ...]:
        """The hub ids of weights that this endpoint is made for; empty for a model that needs no weights."""

    @property
    def extra_weights(self) -> tuple[ExtraWeights, ...]:
        """The additional weights without which this endpoint is not served."""

    @property
    def Input(self) -> type[ImageInput]:  # noqa: N802  the wire name
        """The pydantic model of a request."""

    @property
    def Output(self) -> type[BaseModel]:  # noqa: N802
        """The pydantic model of a request's output."""

    def setup(self, config: EngineConfig) -> Engine:
        """Load the weights and return the engine; may take minutes. Raises OSError if the weights cannot be loaded.

        Called on the thread that later calls the engine: once for all endpoints that share the engine, and again after
        the engine was closed to make room for another engine.
        """

    def build_output(
        self,
        request: Any,
        images: Sequence[Mapping[str, Any]],
        has_nsfw_concepts: Sequence[bool],
        timings: Mapping[str, float],
    ) -> BaseModel:
        """Build the Output. Each of `images` has url, width, height and content_type; `timings` are in seconds."""

    def metadata(self, request: Any, seed: int) -> Mapping[str, Any]:
        """Return the parameters to store in an image's file. They depend only on the request and the image's seed."""
