"""The input and output fields that models share, such as sizes with their presets, seeds and LoRAs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

MAX_PROMPT_LENGTH = 20_000
EXAMPLE_PROMPT = (
    "Extreme close-up of a single tiger eye, direct frontal view. Detailed iris and pupil. Sharp focus on eye texture "
    'and color. Natural lighting to capture authentic eye shine and depth. The word "FLUX" is painted over it in big, '
    "white brush strokes with visible texture."
)
EXAMPLE_LORA = "XLabs-AI/flux-RealismLora"
#: An orange square as a data URI, so that the example runs without fetching a file.
EXAMPLE_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAAA1BMVEX3ix41iSRsAAAAD0lEQVR42mNgGAWjgHwA"
    "AAJAAAHgTR1EAAAAAElFTkSuQmCC"
)
#: A mask for this image as a data URI: the right half is white.
EXAMPLE_MASK = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQAAAACCEkxzAAAAGklEQVR42mNkYGBg+M/AwMDEAAWjjFEG8QwA"
    "yyMBf5gYzUkAAAAASUVORK5CYII="
)
#: The most LoRAs of a request; fal has no limit. Each LoRA takes a download, a process that checks its header, and the
#: engine's time to set it up, while other requests wait.
MAX_LORAS = 64
MAX_LORA_SCALE = 4
# JavaScript rounds JSON numbers above 2**53. Image k of a request uses seed + k, and k is at most 3.
MAX_SEED = 2**53 - 4


@dataclass(frozen=True)
class InputURL:
    """A marker for a field that holds the URL of a file of this kind, fetched before the request is accepted."""

    kind: Literal["image", "lora", "control_net", "ip_adapter"]


def input_urls(request: BaseModel, loc: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    """Yield the path, the kind of file and the URL of each field marked with InputURL."""
    for name, field in type(request).model_fields.items():
        value = getattr(request, name)
        for marker in field.metadata:
            if isinstance(marker, InputURL) and value is not None:
                yield (*loc, name), marker.kind, value
        if isinstance(value, BaseModel):
            yield from input_urls(value, (*loc, name))
        for place, inner in enumerate(value) if isinstance(value, list | tuple) else ():
            if isinstance(inner, BaseModel):
                yield from input_urls(inner, (*loc, name, place))


def image_inputs(model: type[BaseModel]) -> Iterator[str]:
    """Yield the path of each field that takes an image, such as "image_url" or "control_loras.control_image_url"."""
    for name, field in model.model_fields.items():
        if InputURL("image") in field.metadata:
            yield name
        for item in get_args(field.annotation) if get_origin(field.annotation) is list else ():
            if isinstance(item, type) and issubclass(item, BaseModel):
                yield from (f"{name}.{path}" for path in image_inputs(item))


OutputFormat = Literal["jpeg", "png"]
Acceleration = Literal["none", "regular", "high"]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]

# Fields that several inputs share. Most ranges are those of fal's client types, and most descriptions those of fal's
# page. The page describes an earlier behaviour of sync_mode; its description here is our own.
Prompt = Annotated[
    str,
    Field(max_length=MAX_PROMPT_LENGTH, description="The prompt to generate an image from.", examples=[EXAMPLE_PROMPT]),
]
ImageURL = Annotated[
    str,
    InputURL("image"),
    Field(
        description="The URL of the image to generate an image from: an http or https URL, or a data URI.",
        examples=[EXAMPLE_IMAGE],
    ),
]
MaskURL = Annotated[
    str,
    InputURL("image"),
    Field(
        description="The URL of the mask, as for image_url. White areas change, and black areas stay as they are. The "
        "mask is scaled to the size of the generated image.",
        examples=[EXAMPLE_MASK],
    ),
]
Strength = Annotated[
    float,
    Field(ge=0.01, le=1, description="How much to change the initial image. At 1, nothing of it remains."),
]
InpaintingStrength = Annotated[
    float,
    Field(
        ge=0.01,
        le=1,
        description="How much to change the white areas of the mask. At 1, nothing of the initial image remains there.",
    ),
]
Steps = Annotated[int, Field(description="The number of inference steps to perform.")]
OptionalSeed = Annotated[
    Seed | None,
    Field(
        description="The same seed and the same prompt given to the same version of the model "
        "will output the same image every time."
    ),
]
_GUIDANCE = (
    "The CFG (Classifier Free Guidance) scale is a measure of how close you want the model "
    "to stick to your prompt when looking for a related image to show you."
)
Guidance = Annotated[float, Field(ge=1, le=20, description=_GUIDANCE)]
LoraGuidance = Annotated[float, Field(ge=0, le=35, description=_GUIDANCE)]
KontextGuidance = Annotated[float, Field(ge=0, le=20, description=_GUIDANCE)]
SyncMode = Annotated[
    bool,
    Field(description="If set to true, the response contains the image as a data URI, and no file is stored."),
]
NumImages = Annotated[int, Field(ge=1, le=4, description="The number of images to generate.")]
EnableSafetyChecker = Annotated[bool, Field(description="If set to true, the safety checker will be enabled.")]
OutputFormatField = Annotated[OutputFormat, Field(description="The format of the generated image.")]
_ACCELERATION = "The speed of the generation. A higher level is faster, and may change details of the image."
LoraAccelerationField = Annotated[
    Literal["none", "regular"],
    Field(description=_ACCELERATION),
]
AccelerationField = Annotated[Acceleration, Field(description=_ACCELERATION)]


class InputPart(BaseModel):
    """The base of a request and of the objects in it. Unknown fields are ignored.

    Null in an optional field counts as absent.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or _is_required(cls, name)}


def _is_required(model: type[BaseModel], name: str) -> bool:
    field = model.model_fields.get(name)
    return field is not None and field.is_required()


class LoraWeight(BaseModel):
    """LoRA weights and their scale."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    path: Annotated[
        str,
        InputURL("lora"),
        Field(
            min_length=1,
            description="The URL of the LoRA weights, a safetensors file, or a Hugging Face id such as owner/name.",
            examples=[EXAMPLE_LORA],
        ),
    ]
    scale: float = Field(
        1,
        ge=0,
        le=MAX_LORA_SCALE,
        description="The factor for the LoRA weights when they are added to the base weights.",
    )


Loras = Annotated[
    list[LoraWeight],
    Field(max_length=MAX_LORAS, description="The LoRAs to use for the image generation; their effects add up."),
]


#: What the image at `image_url` is for: generation starts from it, it takes the place of the prompt, the transformer
#: looks at it next to the image that it generates, it is filled where its mask is white, or the generated image has its
#: edges or depths.
ImageRole = Literal["start", "prompt", "reference", "fill", "canny", "depth"]
#: The control LoRA with which FLUX.1 [dev] follows the image at `control_lora_image_url`; empty for none.
ControlLora = Literal["", "canny", "depth"]


class ImageInput(InputPart):
    """The base of every model's Input."""

    image_role: ClassVar[ImageRole] = "start"
    control_lora: ClassVar[ControlLora] = ""

    if TYPE_CHECKING:
        # For the type checker only: each model declares these fields, in the order of fal's page.
        seed: int | None
        sync_mode: bool
        num_images: int
        enable_safety_checker: bool
        output_format: OutputFormat


class Image(BaseModel):
    """A generated image."""

    url: str = Field(description="The URL of the image file, or the image itself as a data URI.")
    width: int
    height: int
    content_type: str = "image/jpeg"


class ImagesOutput(BaseModel):
    """The output of an endpoint that generates images."""

    images: list[Image] = Field(description="The generated image files info.")
    timings: dict[str, float] = Field(description="Seconds spent on each stage, by its name.")
    seed: int = Field(
        description="Seed of the generated Image. It will be the same value of the one passed in the "
        "input or the randomly generated that was used in case none was passed."
    )
    has_nsfw_concepts: list[bool] = Field(description="Whether the generated images contain NSFW concepts.")
    prompt: str = Field(description="The prompt used for generating the image.")
