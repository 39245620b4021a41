"""Input and output fields that models share: sizes and their presets, seeds, limits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError

PRESETS = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}

MAX_PROMPT_LENGTH = 20_000
# JSON numbers above 2**53 are mangled by JavaScript, and picture k is painted with seed + k, k <= 3.
MAX_SEED = 2**53 - 4


@dataclass(frozen=True)
class Limits:
    """What sizes the operator allows: sides in pixels, and the area in pixels."""

    min_side: int = 64
    max_side: int = 2048
    max_pixels: int = 2048 * 2048


class ImageSize(BaseModel):
    """A size in pixels, rounded down to the pipeline's multiple when it is painted."""

    model_config = ConfigDict(frozen=True)

    width: int = Field(512, description="The width of the generated image.", gt=0)
    height: int = Field(512, description="The height of the generated image.", gt=0)

    @field_validator("width", "height")
    @classmethod
    def _within_sides(cls, side: int, info: ValidationInfo) -> int:
        limits = _limits(info)
        if limits and side < limits.min_side:
            raise PydanticKnownError("greater_than_equal", {"ge": limits.min_side})
        if limits and side > limits.max_side:
            raise PydanticKnownError("less_than_equal", {"le": limits.max_side})
        return side

    @model_validator(mode="after")
    def _within_area(self, info: ValidationInfo) -> "ImageSize":
        limits = _limits(info)
        if limits and self.width * self.height > limits.max_pixels:
            raise PydanticCustomError(
                "image_too_large",
                "width times height should be less than or equal to {max_pixels} pixels",
                {"max_pixels": limits.max_pixels},
            )
        return self


def _limits(info: ValidationInfo) -> Limits | None:
    """The limits of the caller; none for a request that was accepted before."""
    return (info.context or {}).get("limits")


def _from_preset(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value not in PRESETS:
        expected = ", ".join(f"'{name}'" for name in PRESETS)
        raise PydanticCustomError(
            "literal_error",
            "Input should be {expected} or an object with width and height",
            {"expected": expected},
        )
    width, height = PRESETS[value]
    return {"width": width, "height": height}


def _to_preset(size: ImageSize) -> Any:
    names = {pixels: name for name, pixels in PRESETS.items()}
    return names.get((size.width, size.height)) or {"width": size.width, "height": size.height}


class _PresetSchema:
    """Shows the field as the endpoint's page does: an object or one of the presets."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"enum": list(PRESETS), "type": "string"}]}


Size = Annotated[ImageSize, BeforeValidator(_from_preset), PlainSerializer(_to_preset), _PresetSchema()]
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_LENGTH)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
OutputFormat = Literal["jpeg", "png"]
Acceleration = Literal["none", "regular", "high"]


class ImageInput(BaseModel):
    """What every model's Input has; unknown fields are ignored, null stands for "not given"."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    if TYPE_CHECKING:
        # Known to the type checker only: each model declares them itself, in the order of its page.
        seed: int | None
        sync_mode: bool
        num_images: int
        enable_safety_checker: bool
        output_format: OutputFormat
        acceleration: Acceleration

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or _is_required(cls, name)}


def _is_required(model: type[BaseModel], name: str) -> bool:
    field = model.model_fields.get(name)
    return field is not None and field.is_required()


class Image(BaseModel):
    """A picture that was painted."""

    url: str = Field(description="Where the picture is, or the picture itself as a data URI.")
    width: int
    height: int
    content_type: str = "image/jpeg"


class ImagesOutput(BaseModel):
    """The answer of an endpoint that paints from a prompt."""

    images: list[Image] = Field(description="The generated image files info.")
    timings: dict[str, float] = Field(description="Seconds spent, by what they were spent on.")
    seed: int = Field(
        description="Seed of the generated Image. It will be the same value of the one passed in the "
        "input or the randomly generated that was used in case none was passed."
    )
    has_nsfw_concepts: list[bool] = Field(description="Whether the generated images contain NSFW concepts.")
    prompt: str = Field(description="The prompt used for generating the image.")
