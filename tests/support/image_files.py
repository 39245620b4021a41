"""Image files: encoding, decoding, data URIs, and an image of noise."""

import base64
import io
from typing import Any

import numpy
from PIL import Image


def encode(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    """Encode the image as a file of this format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def decode(content: bytes | str) -> Image.Image:
    """Decode all of an image file, given as bytes, as base64 or as a data URI."""
    content = base64.b64decode(content.rpartition(",")[2]) if isinstance(content, str) else content
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def data_uri(content: bytes, content_type: str = "image/png") -> str:
    """Return the content of a file as a data URI."""
    return f"data:{content_type};base64,{base64.b64encode(content).decode()}"


def noise_image(width: int = 96, height: int = 80, channels: int = 3) -> Image.Image:
    """Make an image of noise, the same each time for the same size and channels."""
    values = numpy.random.default_rng(1).integers(0, 256, (height, width, channels), dtype=numpy.uint8)
    return Image.fromarray(values.squeeze())
