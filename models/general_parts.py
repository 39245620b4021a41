"""The parts of a request to fal-ai/flux-general: control LoRAs, control nets and IP adapters."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from models.loading.specs import CONTROL_LORAS
from models.schema import EXAMPLE_IMAGE, MAX_LORA_SCALE, InputPart, InputURL


def _at_start(value: float, info: ValidationInfo) -> float:
    """Refuse an end that is not after the start, with which the control image would do nothing."""
    if value <= info.data.get("start_percentage", 0):
        raise PydanticCustomError("value_error", "end_percentage should be greater than start_percentage.")
    return value


def _refuse(value: Any, info: ValidationInfo) -> Any:
    """Refuse a field of fal's that this server does not support, unless its value has no effect."""
    default = _WITHOUT_EFFECT.get(info.field_name or "")
    # What is on by default has an effect if it is off.
    if value not in (None, default) and (default is True or value not in (False, "", [], {})):
        raise PydanticCustomError("feature_not_supported", "This field is not supported by this server; leave it out.")
    return value


#: The most control nets of a request, and the most images of a union.
MAX_CONTROLS = 4
#: A field that only fal supports. It is not in the published schema.
Unsupported = Annotated[SkipJsonSchema[Any], AfterValidator(_refuse)]
#: The defaults of such fields, which some clients send.
_WITHOUT_EFFECT = {
    "mask_threshold": 0.5,
    "image_projection_shortcut": True,
    "unconditional_noising_factor": 0,
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
    float, Field(ge=0, le=1, description="The share of the steps after which the control image is followed.")
]
EndPercentage = Annotated[
    float,
    Field(ge=0, le=1, description="The share of the steps after which the control image is followed no more."),
    AfterValidator(_at_start),
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


def _only(value: Any) -> Any:
    """Return the only URL of a list, because fal takes a list here too."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


class IPAdapter(InputPart):
    """An IP adapter, and the image that is a prompt by it."""

    ip_adapter_image_url: Annotated[
        str,
        InputURL("image"),
        BeforeValidator(_only),
        Field(description="The URL of the image to take as a prompt.", examples=[EXAMPLE_IMAGE]),
    ]
    ip_adapter_mask_url: Unsupported = None
    path: Annotated[
        str,
        InputURL("ip_adapter"),
        Field(
            min_length=1,
            description="The URL of the IP adapter, a safetensors file, or a Hugging Face id such as owner/name.",
            examples=["XLabs-AI/flux-ip-adapter"],
        ),
    ]
    model_subfolder: Unsupported = None
    weight_name: Unsupported = None
    insight_face_model_path: Unsupported = None
    scale: float = Field(1, ge=0, le=2, description="How much the image counts.")
    scale_json: Unsupported = None
    unconditional_noising_factor: Unsupported = None
    image_projection_shortcut: Unsupported = None


ControlNets = Annotated[
    list[ControlNet],
    Field(max_length=MAX_CONTROLS, description="The control nets to use for the image generation."),
]
ControlNetUnions = Annotated[
    list[ControlNetUnion],
    Field(max_length=1, description="The union of control nets to use for the image generation; at most one."),
]
IPAdapters = Annotated[
    list[IPAdapter],
    Field(max_length=MAX_CONTROLS, description="The IP adapters to use, each with an image as a further prompt."),
]
