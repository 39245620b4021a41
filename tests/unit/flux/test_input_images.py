"""Tests of a request's images: what each is for, and the size that they give the generated image."""

from types import SimpleNamespace

import pytest
from PIL import Image

from models.base import GenerationFailed
from models.flux.input_images import InputImages, requested_size
from models.flux_kontext import FluxKontextDevInput
from models.image_size import ImageSize


def image(width: int = 96, height: int = 64) -> Image.Image:
    return Image.new("RGB", (width, height))


def test_the_size_is_the_requested_one_or_that_of_the_image() -> None:
    images = InputImages(start=image())
    assert requested_size(SimpleNamespace(image_size=ImageSize(width=128, height=80)), images, 16) == (128, 80)
    assert requested_size(SimpleNamespace(image_size=None), images, 16) == (96, 64)
    assert requested_size(SimpleNamespace(), images, 16) == (96, 64)


def test_a_request_without_a_size_fails_with_a_message_for_its_client() -> None:
    """An endpoint of --models-dir can have an Input with neither field."""
    with pytest.raises(GenerationFailed, match="neither image_size nor an image"):
        requested_size(SimpleNamespace(), InputImages(), 16)


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("match_input", (96, 64)),
        # Of the sizes that Kontext was trained on, 1248x832 has exactly the aspect ratio of this image.
        ("auto", (1248, 832)),
        ("1:1", (1024, 1024)),
        ("16:9", (1392, 752)),
        ("9:21", (672, 1568)),
    ],
)
def test_kontexts_resolution_modes(mode: str, size: tuple[int, int]) -> None:
    request = FluxKontextDevInput.model_validate({"prompt": "", "image_url": "unused", "resolution_mode": mode})
    assert requested_size(request, InputImages(reference=image()), 16) == size
