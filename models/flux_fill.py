"""fal-ai/flux-lora-fill: FLUX.1 Fill [dev] with LoRA weights, which fills the masked part of an image."""

from typing import Annotated, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from models.base import Model
from models.flux_dev import FluxDev
from models.image_size import SizeOfInput
from models.schema import (
    EXAMPLE_IMAGE,
    EnableSafetyChecker,
    ImageInput,
    ImageRole,
    ImageURL,
    InputURL,
    LoraAccelerationField,
    LoraGuidance,
    Loras,
    MaskURL,
    NumImages,
    OptionalSeed,
    OutputFormatField,
    Prompt,
    Steps,
    SyncMode,
)

#: The hub ids of the weights.
FILL = ("black-forest-labs/FLUX.1-Fill-dev",)
_FILL_IMAGE = "The URL of the image, as for image_url, or a list of one URL."


def _unwrap_single(value: object) -> object:
    """Return the value in a list of one, which fal accepts too; None for an empty list."""
    if not isinstance(value, list):
        return value
    if len(value) > 1:
        raise PydanticCustomError("too_long", "only one image is supported")
    return value[0] if value else None


class ImageFillInput(BaseModel):
    """An image whose tokens follow those of the prompt."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    fill_image_url: Annotated[
        str | None,
        BeforeValidator(_unwrap_single),
        InputURL("image"),
        WithJsonSchema(
            {
                "title": "FillImageUrl",
                "description": _FILL_IMAGE,
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}, "maxItems": 1},
                    {"type": "null"},
                ],
                "examples": [EXAMPLE_IMAGE],
            }
        ),
    ] = None


class FluxLoraFillInput(ImageInput):
    """A request to FLUX.1 Fill [dev] to fill the masked part of an image, with LoRA weights."""

    image_role: ClassVar[ImageRole] = "fill"

    prompt: Prompt = ""
    image_size: SizeOfInput = None
    num_inference_steps: Steps = Field(28, ge=1, le=50)
    seed: OptionalSeed = None
    loras: Loras = Field([])
    guidance_scale: LoraGuidance = 30
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "jpeg"
    image_url: ImageURL
    mask_url: MaskURL
    paste_back: bool = Field(
        True, description="If set to true, the black areas of the mask are copied from the input image."
    )
    fill_image: ImageFillInput | None = Field(
        None, description="An image that shows what to put there. Its tokens follow those of the prompt."
    )
    resize_to_original: bool = Field(
        False, description="If set to true, the generated image is scaled to the size of the input image."
    )
    acceleration: LoraAccelerationField = "none"


class FluxLoraFill(FluxDev):
    """FLUX.1 Fill [dev] with LoRA weights, which fills the white part of a mask so that it fits the rest."""

    endpoint = "fal-ai/flux-lora-fill"
    weights = FILL
    Input: type[ImageInput] = FluxLoraFillInput


MODELS: tuple[Model, ...] = (FluxLoraFill(),)
