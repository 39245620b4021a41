"""fal-ai/flux-general: FLUX.1 [dev] with LoRAs, control nets, IP adapters, a control LoRA, and real guidance."""

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from models.base import Model
from models.flux_dev import FluxDev
from models.general_parts import ControlLoras, ControlNets, ControlNetUnions, IPAdapters, Unsupported
from models.image_size import Size, SizeOfInput
from models.schema import (
    MAX_PROMPT_LENGTH,
    EnableSafetyChecker,
    ImageInput,
    ImageURL,
    InpaintingStrength,
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

RealCfgScale = Annotated[
    float,
    Field(
        ge=0,
        le=20,
        description="The scale of the real classifier-free guidance, away from the negative prompt. Up to 1, there is "
        "none.",
    ),
]
UseRealCfg = Annotated[
    bool,
    Field(
        description="If set to true, real classifier-free guidance is used. With a scale above 1, a step takes twice "
        "as long."
    ),
]
NegativePrompt = Annotated[
    str,
    Field(
        max_length=MAX_PROMPT_LENGTH,
        description="What the image should not show. It needs real classifier-free guidance.",
    ),
]
Shift = Annotated[float, Field(ge=0, le=10)]


class _GeneralInput(ImageInput):
    """The fields of every request, in fal's order as far as they are supported."""

    prompt: Prompt
    image_size: Any
    num_inference_steps: Steps = Field(28, ge=1, le=50)
    seed: OptionalSeed = None
    loras: Loras = Field([])
    control_loras: ControlLoras = Field([])
    controlnets: ControlNets = Field([])
    controlnet_unions: ControlNetUnions = Field([])
    ip_adapters: IPAdapters = Field([])
    easycontrols: Unsupported = None
    fill_image: Unsupported = None
    guidance_scale: LoraGuidance = 3.5
    real_cfg_scale: RealCfgScale = 3.5
    use_real_cfg: UseRealCfg = False
    use_cfg_zero: Unsupported = False
    sync_mode: SyncMode = False
    num_images: NumImages = 1
    enable_safety_checker: EnableSafetyChecker = True
    reference_image_url: Unsupported = None
    reference_strength: Unsupported = None
    reference_start: Unsupported = None
    reference_end: Unsupported = None
    base_shift: Shift = Field(0.5, description="How far the timesteps of small images are shifted towards noise.")
    max_shift: Shift = Field(1.15, description="How far the timesteps of large images are shifted towards noise.")
    output_format: OutputFormatField = "png"
    use_beta_schedule: Unsupported = False
    sigma_schedule: Unsupported = None
    scheduler: Unsupported = None
    negative_prompt: NegativePrompt = ""
    nag_scale: Unsupported = None
    nag_tau: Unsupported = None
    nag_alpha: Unsupported = None
    nag_end: Unsupported = None

    @field_validator("negative_prompt")
    @classmethod
    def _needs_real_cfg(cls, value: str, info: ValidationInfo) -> str:
        if value and not info.data.get("use_real_cfg"):
            raise PydanticCustomError(
                "feature_not_supported",
                "A negative prompt is supported with use_real_cfg only: set it to true, or leave negative_prompt out.",
            )
        return value


class FluxGeneralInput(_GeneralInput):
    """A request to FLUX.1 [dev] for an image, with LoRAs, control nets, IP adapters and a negative prompt."""

    image_size: Size = Field("landscape_4_3", validate_default=True, description="The size of the generated image.")


class FluxGeneralImageToImageInput(_GeneralInput):
    """A request to FLUX.1 [dev] to change an image, with LoRAs, control nets, IP adapters and a negative prompt."""

    image_size: SizeOfInput = None
    image_url: ImageURL
    strength: Strength = 0.85


class FluxGeneralInpaintingInput(_GeneralInput):
    """A request to change the masked part of an image, with LoRAs, control nets, IP adapters and a negative prompt."""

    image_size: SizeOfInput = None
    image_url: ImageURL
    strength: InpaintingStrength = 0.85
    mask_url: MaskURL


class FluxGeneral(FluxDev):
    """FLUX.1 [dev] with LoRAs, control nets, IP adapters, a control LoRA, and real guidance."""

    endpoint = "fal-ai/flux-general"
    Input: type[ImageInput] = FluxGeneralInput


class FluxGeneralImageToImage(FluxGeneral):
    """The same as fal-ai/flux-general, starting from an image and changing it towards a prompt."""

    endpoint = "fal-ai/flux-general/image-to-image"
    Input: type[ImageInput] = FluxGeneralImageToImageInput


class FluxGeneralInpainting(FluxGeneral):
    """The same as fal-ai/flux-general, changing an image where its mask is white."""

    endpoint = "fal-ai/flux-general/inpainting"
    Input: type[ImageInput] = FluxGeneralInpaintingInput


MODELS: tuple[Model, ...] = (FluxGeneral(), FluxGeneralImageToImage(), FluxGeneralInpainting())
