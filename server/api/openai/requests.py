"""Requests of OpenAI's images API, and their translation into the fields of fal's endpoints."""

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import ImageOps
from PIL.Image import Resampling
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from models.base import Model
from models.image_size import PRESETS, ImageSize, Limits, Size
from server.api import validation
from server.api.model_names import ModelNames, is_inline_name, is_openai_name
from server.errors import InvalidInput
from server.inputs import images
from server.inputs.form import FormFile, SpooledForm

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


@dataclass(frozen=True)
class Encoding:
    """A format in which the response encodes the endpoint's images again, with a quality from 0 to 100."""

    format: Literal["webp", "jpeg"]
    quality: int


class CommonRequest(BaseModel):
    """The fields of every request for images. Fields that OpenAI does not have, such as seed, go to the model."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, max_length=255)
    n: int | None = Field(None, ge=1)
    size: str | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    user: str | None = None

    @property
    def is_streamed(self) -> bool:
        """Whether the response is a stream of events."""
        return False

    @property
    def is_inline(self) -> bool:
        """Whether the response holds the images themselves: in streams, and for OpenAI's newer models, as at OpenAI."""
        default = "b64_json" if is_inline_name(self.model or "") else "url"
        return self.is_streamed or (self.response_format or default) == "b64_json"

    @property
    def encoding(self) -> Encoding | None:
        """The encoding of the response's images; None for images as the endpoint encodes them.

        Endpoints generate no WebP, and choose the quality of their JPEG themselves.
        """
        if self.output_format == "webp":
            return Encoding("webp", 100 if self.output_compression is None else self.output_compression)
        if self.output_format == "jpeg" and self.output_compression is not None:
            return Encoding("jpeg", self.output_compression)
        return None

    @property
    def fields(self) -> dict[str, Any]:
        """The request, translated to the model's fields. Raises InvalidInput for an invalid size or format."""
        if self.encoding and not self.is_inline:
            field = "output_format" if self.output_format == "webp" else "output_compression"
            message = "WebP images, and JPEG images with an output_compression, need the response_format b64_json"
            raise InvalidInput.of("value_error", ("body", field), message)
        output_format = self.output_format or ("png" if is_openai_name(self.model or "") else None)
        translated = {
            "num_images": self.n,
            "image_size": _size(self.size),
            # PNG loses nothing before the response encodes the image again.
            "output_format": "png" if self.encoding else output_format,
            "sync_mode": self.is_inline,
        }
        fields = {name: value for name, value in translated.items() if value is not None}
        return {**(self.model_extra or {}), **fields}


class VariationRequest(CommonRequest):
    """A request for variations of an image."""


class ImagesRequest(CommonRequest):
    """A request for images from a prompt, or for edits of an image."""

    prompt: str
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)

    @property
    def is_streamed(self) -> bool:
        """Whether the response is a stream of events."""
        return bool(self.stream)

    @property
    def fields(self) -> dict[str, Any]:
        """The request, translated to the model's fields, with the prompt. Raises as CommonRequest's does."""
        return {**super().fields, "prompt": self.prompt}


def translate_form(form: SpooledForm, sent: CommonRequest, names: ModelNames, limits: Limits) -> Model:
    """Set the form's text to the fields of an endpoint that can edit the form's image; return this endpoint's model.

    Raises InvalidInput for unusable fields or files, or if no served endpoint can do this, and UnknownModel.
    """
    image, mask = _only_file(form, "image"), _only_file(form, "mask")
    if image is None:
        message = "Field required: send the image as a file of the form"
        raise InvalidInput.of("missing", ("body", "image"), message)
    is_edit = isinstance(sent, ImagesRequest)
    prompt = {"prompt": "prompt"} if is_edit else {}
    needed = {**prompt, "image_url": "image", **({"mask_url": "mask"} if mask else {})}
    model = names.find_variant(names.find(sent.model), needed)
    fields, size = sent.fields, None
    if "image_size" in fields and (is_edit or "image_size" not in model.Input.model_fields):
        # An edit of the input image would stretch it to another size, and some endpoints cannot change the size. So the
        # image and the mask are cropped to the wanted size, which input images may have.
        limits = replace(limits, max_pixels=min(limits.max_pixels, images.MAX_SOURCE_PIXELS))
        size = validation.parse_body(_Sized, to_json(fields), {"limits": limits}).image_size
        image.convert = partial(_convert_image, size=size, limits=limits)
    if mask:
        mask.convert = partial(_convert_mask, size=size, limits=limits)
    form.text = to_json({**fields, "image_url": image.url, "mask_url": mask.url if mask else None})
    return model


class _Sized(BaseModel):
    image_size: Size


def _convert_image(source: Path, target: Path, *, size: ImageSize, limits: Limits) -> None:
    """Scale and crop an image to this size."""
    fitted = ImageOps.fit(images.decode_image(source, limits), (size.width, size.height), Resampling.LANCZOS)
    fitted.save(target, "PNG", compress_level=1)


def _convert_mask(source: Path, target: Path, *, size: ImageSize | None, limits: Limits) -> None:
    """Convert OpenAI's mask, transparent where to repaint, to fal's, which is white there."""
    mask = images.decode_transparency(source, limits)
    if size is not None:
        mask = ImageOps.fit(mask, (size.width, size.height), Resampling.LANCZOS)
    mask.save(target, "PNG", compress_level=1)


def _only_file(form: SpooledForm, name: str) -> FormFile | None:
    files = form.files.get(name, [])
    if len(files) > 1:
        raise InvalidInput.of("too_long", ("body", name), f"Send one {name}; {len(files)} were sent")
    return files[0] if files else None


def _size(size: str | None) -> str | dict[str, int] | None:
    """Parse a size: `auto` for the model's default, WIDTHxHEIGHT, or one of fal's presets. Raises InvalidInput."""
    if size is None or size == "auto":
        return None
    match = _SIZE.fullmatch(size)
    if not match and size not in PRESETS:
        message = f"Input should be auto, WIDTHxHEIGHT such as 1024x768, or one of {', '.join(PRESETS)}"
        raise InvalidInput.of("value_error", ("body", "size"), message, size[:100])
    return {"width": int(match[1]), "height": int(match[2])} if match else size
