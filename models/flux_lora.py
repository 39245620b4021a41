"""fal-ai/flux-lora and fal-ai/flux-krea-lora: FLUX.1 [dev] and Krea [dev] with LoRA weights of the client's choice."""

from pydantic import Field

from models.base import Model
from models.flux_dev import FluxDev, FluxDevImageToImage
from models.flux_krea import KREA
from models.image_size import Size, SizeOfInput
from models.schema import (
    EnableSafetyChecker,
    ImageInput,
    ImageURL,
    InpaintingStrength,
    LoraAccelerationField,
    LoraGuidance,
    Loras,
    MaskURL,
    NumImages,
    OptionalSeed,
    OutputFormatField,
    Prompt,
    Steps,
    Strength,
    SyncMode,
)


class FluxLoraInput(ImageInput):
    """A request for an image with LoRA weights."""

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
    acceleration: LoraAccelerationField = "none"


class _LoraEditInput(ImageInput):
    """The fields of every request to change an image with LoRA weights."""

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
    image_url: ImageURL
    strength: Strength = 0.85


class FluxLoraImageToImageInput(_LoraEditInput):
    """A request to change an image with LoRA weights."""

    acceleration: LoraAccelerationField = "none"


class _LoraInpaintingInput(_LoraEditInput):
    """The fields of every request to change the masked part of an image with LoRA weights."""

    mask_url: MaskURL
    strength: InpaintingStrength = 0.85


class FluxLoraInpaintingInput(_LoraInpaintingInput):
    """A request to change the masked part of an image with LoRA weights, without a field for the acceleration."""


class FluxKreaLoraInpaintingInput(_LoraInpaintingInput):
    """A request to change the masked part of an image with LoRA weights."""

    acceleration: LoraAccelerationField = "none"


class FluxLora(FluxDev):
    """FLUX.1 [dev] with LoRA weights, which add a style or a subject."""

    endpoint = "fal-ai/flux-lora"
    Input = FluxLoraInput


class FluxLoraImageToImage(FluxDevImageToImage):
    """FLUX.1 [dev] with LoRA weights, starting from an image and changing it towards a prompt."""

    endpoint = "fal-ai/flux-lora/image-to-image"
    Input: type[ImageInput] = FluxLoraImageToImageInput


class FluxLoraInpainting(FluxLoraImageToImage):
    """FLUX.1 [dev] with LoRA weights, changing the white part of a mask towards a prompt and keeping the rest."""

    endpoint = "fal-ai/flux-lora/inpainting"
    Input: type[ImageInput] = FluxLoraInpaintingInput


class FluxKreaLora(FluxLora):
    """FLUX.1 Krea [dev] with LoRA weights, which add a style or a subject."""

    endpoint = "fal-ai/flux-krea-lora"
    weights = KREA


class FluxKreaLoraImageToImage(FluxLoraImageToImage):
    """FLUX.1 Krea [dev] with LoRA weights, starting from an image and changing it towards a prompt."""

    endpoint = "fal-ai/flux-krea-lora/image-to-image"
    weights = KREA


class FluxKreaLoraInpainting(FluxLoraInpainting):
    """FLUX.1 Krea [dev] with LoRA weights, changing the white part of a mask towards a prompt and keeping the rest."""

    endpoint = "fal-ai/flux-krea-lora/inpainting"
    weights = KREA
    Input = FluxKreaLoraInpaintingInput


MODELS: tuple[Model, ...] = (
    FluxLora(),
    FluxLoraImageToImage(),
    FluxLoraInpainting(),
    FluxKreaLora(),
    FluxKreaLoraImageToImage(),
    FluxKreaLoraInpainting(),
)
