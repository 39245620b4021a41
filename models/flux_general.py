"""fal-ai/flux-general: FLUX.1 [dev] with LoRAs, control nets, a control LoRA, and classifier-free guidance."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from models.base import Model
from models.flux_dev import FluxDev
from models.image_size import Size, SizeOfInput
from models.loading.specs import CONTROL_LORAS
from models.schema import (
    EXAMPLE_IMAGE,
    MAX_LORA_SCALE,
    MAX_PROMPT_LENGTH,
    EnableSafetyChecker,
    ImageInput,
    ImageURL,
    InpaintingStrength,
    InputPart,
    InputURL,
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


def _at_start(value: float, info: ValidationInfo) -> float:
    """Refuse an end that is not after the start, with which the control image would do nothing."""
    if value <= info.data.get("start_percentage", 0):
        raise PydanticCustomError("value_error", "end_percentage should be greater than start_percentage.")
    return value


def _refuse(value: Any, info: ValidationInfo) -> Any:
    """Refuse a field of fal's that this server does not support, unless its value has no effect."""
    if value not in (None, False, "", [], {}, _WITHOUT_EFFECT.get(info.field_name or "")):
        raise PydanticCustomError("feature_not_supported", "This field is not supported by this server; leave it out.")
    return value


#: The most control nets of a request, and the most images of a union.
MAX_CONTROLS = 4
#: A field that only fal supports. It is not in the published schema.
Unsupported = Annotated[SkipJsonSchema[Any], AfterValidator(_refuse)]
#: The defaults of such fields, which some clients send.
_WITHOUT_EFFECT = {
    "mask_threshold": 0.5,
    "reference_strength": 0.65,
    "reference_start": 0,
    "reference_end": 1,
    "scheduler": "euler",
    "nag_scale": 3,
    "nag_tau": 2.5,
    "nag_alpha": 0.25,
    "nag_end": 0.25,
}
ControlNetPath = Annotated[
    str,
    InputURL("control_net"),
    Field(
        min_length=1,
        description="The URL of the control net, a safetensors file in diffusers' layout, or a Hugging Face id such as "
        "owner/name.",
        examples=["InstantX/FLUX.1-dev-Controlnet-Canny"],
    ),
]
ConfigURL = Annotated[
    str | None, Field(description="Not needed and not fetched: the configuration follows from the file of the weights.")
]
ControlNetImageURL = Annotated[
    str,
    InputURL("image"),
    Field(description="The URL of the control image, as the control net expects it.", examples=[EXAMPLE_IMAGE]),
]
ConditioningScale = Annotated[float, Field(ge=0, le=2, description="How closely to follow the control image.")]
StartPercentage = Annotated[
    float, Field(ge=0, lt=1, description="The share of the steps after which the control image is followed.")
]
EndPercentage = Annotated[
    float,
    AfterValidator(_at_start),
    Field(gt=0, le=1, description="The share of the steps after which the control image is followed no more."),
]


class ControlNet(InputPart):
    """A control net, and the image that it follows."""

    path: ControlNetPath
    config_url: ConfigURL = None
    variant: Unsupported = None
    image_url: ControlNetImageURL
    mask_url: Unsupported = None
    conditioning_scale: ConditioningScale = 1
    start_percentage: StartPercentage = 0
    end_percentage: EndPercentage = 1
    ip_adapter_index: Unsupported = None


class ControlNetUnionInput(InputPart):
    """An image that a union of control nets follows, and what it shows."""

    control_image_url: ControlNetImageURL
    mask_image_url: Unsupported = None
    control_mode: Literal["canny", "tile", "depth", "blur", "pose", "gray", "low-quality"] = Field(
        description="What the control image shows."
    )
    conditioning_scale: ConditioningScale = 1
    mask_threshold: Unsupported = None
    start_percentage: StartPercentage = 0
    end_percentage: EndPercentage = 1


class ControlNetUnion(InputPart):
    """A union of control nets, which are one network, and the images that it follows."""

    path: ControlNetPath
    config_url: ConfigURL = None
    variant: Unsupported = None
    controls: Annotated[
        list[ControlNetUnionInput],
        Field(min_length=1, max_length=MAX_CONTROLS, description="The images to follow, each with its mode."),
    ]


class ControlLoraWeight(InputPart):
    """A control LoRA, its scale, and the image that it follows."""

    path: Annotated[
        str,
        InputURL("lora"),
        Field(
            min_length=1,
            description="The URL of the control LoRA, a safetensors file, or a Hugging Face id such as owner/name.",
            examples=[CONTROL_LORAS["canny"].hub_id],
        ),
    ]
    scale: float = Field(1, ge=0, le=MAX_LORA_SCALE, description="How closely to follow the control image.")
    control_image_url: Annotated[
        str,
        InputURL("image"),
        Field(description="The URL of the control image, whose composition to follow.", examples=[EXAMPLE_IMAGE]),
    ]
    preprocess: Literal["canny", "depth", "None"] = Field(
        "None", description="What of the control image to follow: its edges, its depths, or the image as it is."
    )


ControlLoras = Annotated[
    list[ControlLoraWeight],
    Field(max_length=1, description="The control LoRA to use for the image generation; at most one."),
]
ControlNets = Annotated[
    list[ControlNet],
    Field(max_length=MAX_CONTROLS, description="The control nets to use for the image generation."),
]
ControlNetUnions = Annotated[
    list[ControlNetUnion],
    Field(max_length=1, description="The union of control nets to use for the image generation; at most one."),
]
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
    ip_adapters: Unsupported = None
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
    """A request to FLUX.1 [dev] for an image, with LoRAs, control nets and a negative prompt."""

    image_size: Size = Field("landscape_4_3", validate_default=True, description="The size of the generated image.")


class FluxGeneralImageToImageInput(_GeneralInput):
    """A request to FLUX.1 [dev] to change an image, with LoRAs, control nets and a negative prompt."""

    image_size: SizeOfInput = None
    image_url: ImageURL
    strength: Strength = 0.85


class FluxGeneralInpaintingInput(_GeneralInput):
    """A request to change the masked part of an image, with LoRAs, control nets and a negative prompt."""

    image_size: SizeOfInput = None
    image_url: ImageURL
    strength: InpaintingStrength = 0.85
    mask_url: MaskURL


class FluxGeneral(FluxDev):
    """FLUX.1 [dev] with LoRAs, control nets, a control LoRA, and classifier-free guidance."""

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
