"""Tests of requests in the form of OpenAI's images API."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from models.base import Model
from models.image_size import Limits
from server.api.model_names import ModelNames
from server.api.openai.requests import Encoding, ImagesRequest, VariationRequest, translate_form
from server.errors import InvalidInput
from server.inputs.form import SpooledForm
from server.inputs.resolver import MAX_IMAGE_BYTES
from tests.support.image_files import encode
from tests.support.models.copy_of import MODEL
from tests.support.models.inpaint import MODEL as INPAINT
from tests.support.models.vary import MODEL as VARY

MODELS: dict[str, Model] = {model.endpoint: model for model in (MODEL, INPAINT, VARY)}
NAMES = ModelNames(MODELS, dict.fromkeys(MODELS))
#: Limits of an operator who allows more than input images may have.
LIMITS = Limits(max_side=10_000, max_pixels=10_000 * 10_000)


@pytest.fixture
def form(tmp_path: Path) -> Iterator[SpooledForm]:
    """Yield a form with an image, red in its left quarter and blue elsewhere."""
    image = Image.new("RGB", (128, 64), "blue")
    image.paste("red", (0, 0, 32, 64))
    with form_with(tmp_path, image=image) as form:
        yield form


@contextmanager
def form_with(directory: Path, **files: Image.Image) -> Iterator[SpooledForm]:
    """Yield a form with these files."""
    paths = (directory / f"part{number}" for number in count())
    form = SpooledForm(lambda: next(paths), "multipart/form-data; boundary=x", MAX_IMAGE_BYTES)
    for name, image in files.items():
        form.write(b'--x\r\nContent-Disposition: form-data; name="%s"; filename="a.png"\r\n\r\n' % name.encode())
        form.write(encode(image) + b"\r\n")
    form.write(b"--x--\r\n")
    form.finish()
    yield form
    form.close()


def linked(form: SpooledForm, name: str, path: Path) -> Image.Image:
    """Return the image that an endpoint gets for a file of the form."""
    (file,) = form.files[name]
    file.link(path / "linked", MAX_IMAGE_BYTES)
    with Image.open(path / "linked") as image:
        image.load()
    (path / "linked").unlink()
    return image


def test_an_image_is_scaled_to_the_size(form: SpooledForm, tmp_path: Path) -> None:
    sent = ImagesRequest(prompt="", size="512x96", model=MODEL.endpoint)
    assert translate_form(form, sent, NAMES, LIMITS) is MODEL
    assert linked(form, "image", tmp_path).size == (512, 96)


def test_an_image_and_its_mask_are_cropped_to_the_size_rather_than_stretched(tmp_path: Path) -> None:
    """Cut off the left quarter, which is red in the image and transparent in the mask."""
    image, mask = Image.new("RGB", (128, 64), "blue"), Image.new("RGBA", (128, 64), (0, 0, 0, 255))
    image.paste("red", (0, 0, 32, 64))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    sent = ImagesRequest(prompt="", size="64x64", model=INPAINT.endpoint)
    with form_with(tmp_path, image=image, mask=mask) as form:
        assert translate_form(form, sent, NAMES, LIMITS) is INPAINT
        assert linked(form, "image", tmp_path).getcolors() == [(64 * 64, (0, 0, 255))]
        assert linked(form, "mask", tmp_path).getcolors() == [(64 * 64, 0)]


def test_the_size_of_variations_is_no_size_of_their_image(form: SpooledForm, tmp_path: Path) -> None:
    sent = VariationRequest(size="64x64", model=VARY.endpoint)
    assert translate_form(form, sent, NAMES, LIMITS) is VARY
    assert linked(form, "image", tmp_path).size == (128, 64)


@pytest.mark.parametrize(
    ("sent", "encoding", "format_of_endpoint"),
    [
        ({"output_format": "webp"}, Encoding("webp", 100), "png"),
        ({"output_format": "webp", "output_compression": 0}, Encoding("webp", 0), "png"),
        ({"output_format": "jpeg", "output_compression": 30}, Encoding("jpeg", 30), "png"),
        ({"output_format": "jpeg"}, None, "jpeg"),
        ({"output_format": "png", "output_compression": 30}, None, "png"),
    ],
)
def test_the_encoding_of_images(sent: dict[str, Any], encoding: Encoding | None, format_of_endpoint: str) -> None:
    request = ImagesRequest(prompt="", response_format="b64_json", **sent)
    assert request.encoding == encoding
    assert request.fields["output_format"] == format_of_endpoint


@pytest.mark.parametrize("name", ["gpt-image-1", "gpt-image-9", "chatgpt-image-latest", "dall-e-3", "my-gpt-image", ""])
def test_only_openais_newer_models_send_the_images_themselves(name: str) -> None:
    assert ImagesRequest(prompt="", model=name).is_inline == name.startswith(("gpt", "chatgpt"))


def test_variations_have_no_stream() -> None:
    """OpenAI streams generations and edits only."""
    sent = VariationRequest.model_validate({"stream": True, "partial_images": 2})
    assert not sent.is_streamed
    assert not sent.is_inline


def test_an_image_is_not_scaled_to_more_than_an_input_image_may_have(form: SpooledForm) -> None:
    sent = ImagesRequest(prompt="", size="5000x4000", model=MODEL.endpoint)
    with pytest.raises(InvalidInput, match="16000000 pixels") as raised:
        translate_form(form, sent, NAMES, LIMITS)
    assert raised.value.detail[0]["loc"] == ["body", "image_size"]
