"""Requests of OpenAI's images API, and their translation into the fields of fal's endpoints."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import ImageOps
from PIL.Image import Resampling
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from models.base import Model
from models.schema import PRESETS, ImageSize, Limits, Size
from server.api import validation
from server.api.model_names import ModelNames, is_openai_name
from server.errors import InvalidInput
from server.inputs import images
from server.inputs.form import FormFile, SpooledForm

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


class VariationRequest(BaseModel):
    """A request for variations of an image. All fields that OpenAI does not have, such as seed, go to the model."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, max_length=255)
    n: int | None = Field(None, ge=1)
    size: str | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    user: str | None = None

    @property
    def is_inline(self) -> bool:
        """Whether the response holds the images themselves: in streams, and for OpenAI's newer models, as at OpenAI."""
        is_newer = "gpt-image" in (self.model or "")
        return bool(self.stream) or (self.response_format or ("b64_json" if is_newer else "url")) == "b64_json"

    @property
    def webp_quality(self) -> int | None:
        """The quality of WebP images, from 0 to 100; None for images in the other formats.

        Endpoints generate no WebP, so the response encodes their images again.
        """
        if self.output_format != "webp":
            return None
        return 100 if self.output_compression is None else self.output_compression

    @property
    def fields(self) -> dict[str, Any]:
        """The request, translated to the model's fields. Raises InvalidInput for an invalid size or format."""
        if self.output_format == "webp" and not self.is_inline:
            raise _invalid("output_format", "value_error", "WebP images need the response_format b64_json")
        output_format = self.output_format or ("png" if is_openai_name(self.model or "") else None)
        translated = {
            "num_images": self.n,
            "image_size": _size(self.size),
            "output_format": "png" if output_format == "webp" else output_format,
            "sync_mode": self.is_inline,
        }
        fields = {name: value for name, value in translated.items() if value is not None}
        return {**(self.model_extra or {}), **fields}


class ImagesRequest(VariationRequest):
    """A request for images from a prompt, or for edits of an image."""

    prompt: str

    @property
    def fields(self) -> dict[str, Any]:
        """The request, translated to the model's fields, with the prompt. Raises as VariationRequest's does."""
        return {**super().fields, "prompt": self.prompt}


def translate_form(form: SpooledForm, sent: VariationRequest, names: ModelNames, limits: Limits) -> Model:
    """Set the form's text to the fields of an endpoint that can edit the form's image; return this endpoint's model.

    Raises InvalidInput for unusable fields or files, or if no served endpoint can do this, and UnknownModel.
    """
    image, mask = _only_file(form, "image"), _only_file(form, "mask")
    if image is None:
        raise _invalid("image", "missing", "Field required: send the image as a file of the form")
    prompt = {"prompt": "prompt"} if isinstance(sent, ImagesRequest) else {}
    needed = {**prompt, "image_url": "image", **({"mask_url": "mask"} if mask else {})}
    model = names.find_variant(names.find(sent.model), needed)
    fields, size = sent.fields, None
    if "image_size" in fields and "image_size" not in model.Input.model_fields:
        # The output has the size of the input image, so the image gets the wanted size, which input images may have.
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
        raise _invalid(name, "too_long", f"FLUX.1 takes one {name}, but {len(files)} were sent")
    return files[0] if files else None


def _size(size: str | None) -> str | dict[str, int] | None:
    """Parse a size: `auto` for the model's default, WIDTHxHEIGHT, or one of fal's presets. Raises InvalidInput."""
    if size is None or size == "auto":
        return None
    match = _SIZE.fullmatch(size)
    if not match and size not in PRESETS:
        message = f"Input should be auto, WIDTHxHEIGHT such as 1024x768, or one of {', '.join(PRESETS)}"
        raise _invalid("size", "value_error", message, size[:100])
    return {"width": int(match[1]), "height": int(match[2])} if match else size


def _invalid(field: str, error_type: str, message: str, value: str = "") -> InvalidInput:
    return InvalidInput([{"type": error_type, "loc": ["body", field], "msg": message, "input": value}])
