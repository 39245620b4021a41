"""fal-ai/flux-lora-canny and fal-ai/flux-lora-depth: FLUX.1 Canny and Depth [dev], which follow edges or depths."""

from typing import Annotated, ClassVar

from pydantic import Field

from models.base import Model
from models.flux_dev import FluxDev
from models.image_size import SizeOfInput
from models.loading.specs import DEPTH
from models.schema import (
    EXAMPLE_IMAGE,
    EnableSafetyChecker,
    ImageInput,
    ImageRole,
    InputURL,
    LoraAccelerationField,
    LoraGuidance,
    Loras,
    NumImages,
    OptionalSeed,
    OutputFormatField,
    Prompt,
    Steps,
    SyncMode,
)

ControlImageURL = Annotated[
    str,
    InputURL("image"),
    Field(
        description="The URL of the image whose composition to follow: an http or https URL, or a data URI.",
        examples=[EXAMPLE_IMAGE],
    ),
]


class _ControlInput(ImageInput):
    """The fields of every request to follow an image, with LoRA weights."""

    prompt: Prompt
    image_size: SizeOfInput = None
    num_inference_steps: Steps = Field(28, ge=1, le=50)
    seed: OptionalSeed = None
    loras: Loras = Field([])
    guidance_scale: LoraGuidance = 3.5
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "jpeg"
    image_url: ControlImageURL


class FluxLoraCannyInput(_ControlInput):
    """A request to FLUX.1 Canny [dev] for an image from a prompt that has the edges of another image."""

    image_role: ClassVar[ImageRole] = "canny"

    guidance_scale: LoraGuidance = 30


class FluxLoraDepthInput(_ControlInput):
    """A request to FLUX.1 Depth [dev] for an image from a prompt that has the depths of another image."""

    image_role: ClassVar[ImageRole] = "depth"

    acceleration: LoraAccelerationField = "none"


class FluxLoraCanny(FluxDev):
    """FLUX.1 Canny [dev] with LoRA weights, which follows the edges of an image."""

    endpoint = "fal-ai/flux-lora-canny"
    weights = ("black-forest-labs/FLUX.1-Canny-dev",)
    Input: type[ImageInput] = FluxLoraCannyInput


class FluxLoraDepth(FluxDev):
    """FLUX.1 Depth [dev] with LoRA weights, which follows the depths of an image."""

    endpoint = "fal-ai/flux-lora-depth"
    weights = ("black-forest-labs/FLUX.1-Depth-dev",)
    extra_weights = (DEPTH,)
    Input: type[ImageInput] = FluxLoraDepthInput


MODELS: tuple[Model, ...] = (FluxLoraCanny(), FluxLoraDepth())
