"""fal-ai/flux-control-lora-canny and -depth: FLUX.1 [dev] with a control LoRA, which follows edges or depths."""

from typing import Annotated, ClassVar

from pydantic import Field

from models.base import ExtraWeights, Model
from models.flux_dev import FluxDev
from models.image_size import Size, SizeOfInput
from models.loading.specs import CONTROL_LORAS, DEPTH
from models.schema import (
    EXAMPLE_IMAGE,
    MAX_LORA_SCALE,
    ControlLora,
    EnableSafetyChecker,
    ImageInput,
    ImageURL,
    InputURL,
    LoraGuidance,
    Loras,
    NumImages,
    OptionalSeed,
    OutputFormatField,
    Prompt,
    Steps,
    Strength,
    SyncMode,
)

ControlLoraImageURL = Annotated[
    str,
    InputURL("image"),
    Field(
        description="The URL of the control image, whose composition to follow: an http or https URL, or a data URI.",
        examples=[EXAMPLE_IMAGE],
    ),
]
ControlLoraStrength = Annotated[
    float, Field(ge=0, le=MAX_LORA_SCALE, description="How closely to follow the control image.")
]
OptionalControlLoraImageURL = Annotated[
    str | None,
    InputURL("image"),
    Field(
        description="The URL of the control image, whose composition to follow: an http or https URL, or a data URI. "
        "Without it, no control image is followed.",
        examples=[EXAMPLE_IMAGE],
    ),
]


class FluxControlLoraCannyInput(ImageInput):
    """A request to FLUX.1 [dev] for an image from a prompt that has the edges of another image."""

    control_lora: ClassVar[ControlLora] = "canny"

    prompt: Prompt
    image_size: Size = Field("landscape_4_3", validate_default=True, description="The size of the generated image.")
    num_inference_steps: Steps = Field(28, ge=1, le=50)
    seed: OptionalSeed = None
    loras: Loras = Field([])
    guidance_scale: LoraGuidance = 3.5
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "jpeg"
    control_lora_image_url: OptionalControlLoraImageURL = None
    control_lora_strength: ControlLoraStrength = 1


class FluxControlLoraCannyImageToImageInput(ImageInput):
    """A request to FLUX.1 [dev] to change an image, so that it has the edges of another."""

    control_lora: ClassVar[ControlLora] = "canny"

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
    control_lora_image_url: OptionalControlLoraImageURL = None
    control_lora_strength: ControlLoraStrength = 1
    image_url: ImageURL
    strength: Strength = 0.85


class FluxControlLoraDepthInput(FluxControlLoraCannyInput):
    """A request to FLUX.1 [dev] for an image from a prompt that has the depths of another image."""

    control_lora: ClassVar[ControlLora] = "depth"

    control_lora_image_url: ControlLoraImageURL
    preprocess_depth: bool = Field(
        True,
        description="If set to true, the depths of the control image are followed. Otherwise the control image shows "
        "depths already, white nearest.",
    )


class FluxControlLoraDepthImageToImageInput(FluxControlLoraCannyImageToImageInput):
    """A request to FLUX.1 [dev] to change an image, so that it has the depths of another."""

    control_lora: ClassVar[ControlLora] = "depth"

    control_lora_image_url: ControlLoraImageURL


class FluxControlLoraCanny(FluxDev):
    """FLUX.1 [dev] with the control LoRA for edges, and with other LoRA weights."""

    endpoint = "fal-ai/flux-control-lora-canny"
    extra_weights: tuple[ExtraWeights, ...] = (CONTROL_LORAS["canny"],)
    Input: type[ImageInput] = FluxControlLoraCannyInput


class FluxControlLoraCannyImageToImage(FluxControlLoraCanny):
    """FLUX.1 [dev] with the control LoRA for edges, starting from an image."""

    endpoint = "fal-ai/flux-control-lora-canny/image-to-image"
    Input: type[ImageInput] = FluxControlLoraCannyImageToImageInput


class FluxControlLoraDepth(FluxDev):
    """FLUX.1 [dev] with the control LoRA for depths, and with other LoRA weights."""

    endpoint = "fal-ai/flux-control-lora-depth"
    extra_weights: tuple[ExtraWeights, ...] = (CONTROL_LORAS["depth"], DEPTH)
    Input: type[ImageInput] = FluxControlLoraDepthInput


class FluxControlLoraDepthImageToImage(FluxControlLoraDepth):
    """FLUX.1 [dev] with the control LoRA for depths, starting from an image."""

    endpoint = "fal-ai/flux-control-lora-depth/image-to-image"
    Input: type[ImageInput] = FluxControlLoraDepthImageToImageInput


MODELS: tuple[Model, ...] = (
    FluxControlLoraCanny(),
    FluxControlLoraCannyImageToImage(),
    FluxControlLoraDepth(),
    FluxControlLoraDepthImageToImage(),
)
