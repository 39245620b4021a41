"""The sizes of images: presets, the operator's limits, and the field of a request."""

from dataclasses import dataclass
from typing import Annotated, Any

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


@dataclass(frozen=True)
class Limits:
    """The sizes that the operator allows: the length of each side, and the area, in pixels."""

    min_side: int = 64
    max_side: int = 2048
    max_pixels: int = 2048 * 2048


class ImageSize(BaseModel):
    """A size in pixels. The server rounds each side down to a multiple of 16 for FLUX.1; other models may differ."""

    model_config = ConfigDict(frozen=True)

    width: int = Field(512, description="The width of the generated image.", gt=0)
    height: int = Field(512, description="The height of the generated image.", gt=0)

    @field_validator("width", "height")
    @classmethod
    def _within_sides(cls, side: int, info: ValidationInfo) -> int:
        limits = limits_of(info)
        if limits and side < limits.min_side:
            raise PydanticKnownError("greater_than_equal", {"ge": limits.min_side})
        if limits and side > limits.max_side:
            raise PydanticKnownError("less_than_equal", {"le": limits.max_side})
        return side

    @model_validator(mode="after")
    def _within_area(self, info: ValidationInfo) -> "ImageSize":
        limits = limits_of(info)
        if limits and self.width * self.height > limits.max_pixels:
            raise PydanticCustomError(
                "image_too_large",
                "width times height should be less than or equal to {max_pixels} pixels",
                {"max_pixels": limits.max_pixels},
            )
        return self


def limits_of(info: ValidationInfo) -> Limits | None:
    """Return the limits in the validation's context; None if it has none, as when an accepted request is read."""
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
    """An annotation that gives `Size` the same JSON schema as on fal: an object or the name of a preset."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        options = [handler(schema), {"enum": list(PRESETS), "type": "string"}]
        # Generators of clients name the type of the field by its title.
        return {"title": "ImageSizeOrPreset", "anyOf": options}


Size = Annotated[ImageSize, BeforeValidator(_from_preset), PlainSerializer(_to_preset), _PresetSchema()]
#: The field of a request with an input image. Its default is None.
SizeOfInput = Annotated[
    Size | None,
    Field(
        description="The size of the generated image, to which the input image is scaled. The default is the size of "
        "the input image, rounded down to a multiple of 16 pixels."
    ),
]
