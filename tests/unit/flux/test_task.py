"""Tests of a FLUX request during generation."""

from types import SimpleNamespace

import pytest
from PIL import Image

from models.base import GenerationFailed
from models.flux.task import requested_size
from models.schema import ImageSize


def test_the_size_is_the_requested_one_or_that_of_the_image() -> None:
    start = Image.new("RGB", (96, 64))
    assert requested_size(SimpleNamespace(image_size=ImageSize(width=128, height=80)), start) == (128, 80)
    assert requested_size(SimpleNamespace(image_size=None), start) == (96, 64)
    assert requested_size(SimpleNamespace(), start) == (96, 64)


def test_a_request_without_a_size_fails_with_a_message_for_its_client() -> None:
    """An endpoint of --models-dir can have an Input with neither field."""
    with pytest.raises(GenerationFailed, match="neither image_size nor an image"):
        requested_size(SimpleNamespace(), None)
