"""fal-ai/flux-kontext and fal-ai/flux-kontext-lora: FLUX.1 Kontext [dev], which edits an image as a prompt says."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from models.base import Model
from models.flux_dev import FluxDev
from models.image_size import Size
from models.kontext_sizes import ResolutionMode, check_limits
from models.schema import (
    EXAMPLE_IMAGE,
    AccelerationField,
    EnableSafetyChecker,
    Guidance,
    ImageInput,
    ImageRole,
    ImageURL,
    InpaintingStrength,
    InputURL,
    KontextGuidance,
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
KONTEXT = ("black-forest-labs/FLUX.1-Kontext-dev",)

ResolutionModeField = Annotated[
    ResolutionMode,
    AfterValidator(check_limits),
    Field(
        description="The size of the generated image. `match_input`: the size of the input image, rounded down to "
        "multiples of 16. `auto`: of the sizes of about one megapixel that the model was trained on, the one whose "
        "aspect ratio is nearest to that of the input image. An aspect ratio such as `16:9`: the trained size nearest "
        "to it."
    ),
]


class FluxKontextDevInput(ImageInput):
    """A request to FLUX.1 Kontext [dev] to edit an image as the prompt says."""

    image_role: ClassVar[ImageRole] = "reference"

    prompt: Prompt
    image_url: ImageURL
    num_inference_steps: Steps = Field(28, ge=1, le=50)
    seed: OptionalSeed = None
    guidance_scale: Guidance = 2.5
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "jpeg"
    acceleration: AccelerationField = "none"
    enhance_prompt: bool = Field(
        False, description="Accepted because fal has this field, and without effect here: the prompt stays as it is."
    )
    resolution_mode: ResolutionModeField = "match_input"


class FluxKontextLoraInput(ImageInput):
    """A request to FLUX.1 Kontext [dev] with LoRA weights to edit an image as the prompt says."""

    image_role: ClassVar[ImageRole] = "reference"

    image_url: ImageURL
    prompt: Prompt
    num_inference_steps: Steps = Field(30, ge=10, le=50)
    seed: OptionalSeed = None
    guidance_scale: KontextGuidance = 2.5
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "png"
    loras: Loras = Field([])
    acceleration: AccelerationField = "none"
    resolution_mode: ResolutionModeField = "match_input"


class FluxKontextLoraTextToImageInput(ImageInput):
    """A request to FLUX.1 Kontext [dev] with LoRA weights for an image from a prompt."""

    prompt: Prompt
    image_size: Size = Field("landscape_4_3", validate_default=True, description="The size of the generated image.")
    num_inference_steps: Steps = Field(30, ge=10, le=50)
    seed: OptionalSeed = None
    guidance_scale: KontextGuidance = 2.5
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "png"
    loras: Loras = Field([])
    acceleration: AccelerationField = "none"


class FluxKontextLoraInpaintInput(ImageInput):
    """A request to FLUX.1 Kontext [dev] with LoRA weights to change the masked part of an image, with a second image to
    look at. The output has the size of the first image, rounded down to multiples of 16.
    """

    image_url: ImageURL
    prompt: Prompt
    num_inference_steps: Steps = Field(30, ge=10, le=50)
    seed: OptionalSeed = None
    guidance_scale: KontextGuidance = 2.5
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    output_format: OutputFormatField = "png"
    loras: Loras = Field([])
    acceleration: AccelerationField = "none"
    reference_image_url: Annotated[
        str,
        InputURL("image"),
        Field(
            description="The URL of the image that shows what to put into the white areas of the mask, as for "
            "image_url.",
            examples=[EXAMPLE_IMAGE],
        ),
    ]
    mask_url: MaskURL
    strength: InpaintingStrength = 0.88


class FluxKontextDev(FluxDev):
    """FLUX.1 Kontext [dev], which edits an image as a prompt says."""

    endpoint = "fal-ai/flux-kontext/dev"
    weights = KONTEXT
    Input: type[ImageInput] = FluxKontextDevInput


class FluxKontextLora(FluxKontextDev):
    """FLUX.1 Kontext [dev] with LoRA weights, which edits an image as a prompt says."""

    endpoint = "fal-ai/flux-kontext-lora"
    Input: type[ImageInput] = FluxKontextLoraInput


class FluxKontextLoraTextToImage(FluxKontextDev):
    """FLUX.1 Kontext [dev] with LoRA weights, which generates an image from a prompt."""

    endpoint = "fal-ai/flux-kontext-lora/text-to-image"
    Input: type[ImageInput] = FluxKontextLoraTextToImageInput


class FluxKontextLoraInpaint(FluxKontextDev):
    """FLUX.1 Kontext [dev] with LoRA weights, changing the white part of a mask after a reference image."""

    endpoint = "fal-ai/flux-kontext-lora/inpaint"
    Input: type[ImageInput] = FluxKontextLoraInpaintInput


MODELS: tuple[Model, ...] = (
    FluxKontextDev(),
    FluxKontextLora(),
    FluxKontextLoraTextToImage(),
    FluxKontextLoraInpaint(),
)
