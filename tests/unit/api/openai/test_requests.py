"""Tests of requests in the form of OpenAI's images API."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from models.schema import Limits
from server.api.model_names import ModelNames
from server.api.openai.requests import ImagesRequest, translate_form
from server.errors import InvalidInput
from server.inputs.form import SpooledForm
from server.inputs.resolver import MAX_IMAGE_BYTES
from tests.support.models.copy_of import MODEL

NAMES = ModelNames({MODEL.endpoint: MODEL}, {MODEL.endpoint: None})
#: Limits of an operator who allows more than input images may have.
LIMITS = Limits(max_side=10_000, max_pixels=10_000 * 10_000)


@pytest.fixture
def form(tmp_path: Path) -> Iterator[SpooledForm]:
    """Yield a form with an image."""
    content = io.BytesIO()
    Image.new("RGB", (64, 64)).save(content, "PNG")
    form = SpooledForm(lambda: tmp_path / "image", "multipart/form-data; boundary=x", MAX_IMAGE_BYTES)
    form.write(b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n')
    form.write(content.getvalue() + b"\r\n--x--\r\n")
    form.finish()
    yield form
    form.close()


def test_an_image_is_scaled_to_the_size(form: SpooledForm, tmp_path: Path) -> None:
    sent = ImagesRequest(prompt="", size="512x96", model=MODEL.endpoint)
    assert translate_form(form, sent, NAMES, LIMITS) is MODEL
    (file,) = form.files["image"]
    file.link(tmp_path / "linked", MAX_IMAGE_BYTES)
    with Image.open(tmp_path / "linked") as image:
        assert image.size == (512, 96)


def test_an_image_is_not_scaled_to_more_than_an_input_image_may_have(form: SpooledForm) -> None:
    sent = ImagesRequest(prompt="", size="5000x4000", model=MODEL.endpoint)
    with pytest.raises(InvalidInput, match="16000000 pixels") as raised:
        translate_form(form, sent, NAMES, LIMITS)
    assert raised.value.detail[0]["loc"] == ["body", "image_size"]
