"""Tests of encoded images and their metadata."""

import io
import json
from typing import Any, get_args
from xml.etree import ElementTree

import pytest
from PIL import ExifTags
from PIL import Image as PILImage
from PIL.Image import Image

from models.schema import MAX_PROMPT_LENGTH, OutputFormat
from server.worker.image_encoder import CONTENT_TYPES, DIGITAL_SOURCE_TYPE, EXTENSIONS, MARK, black, encode

IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
FORMATS: list[OutputFormat] = ["jpeg", "png"]
PARAMETERS: dict[str, Any] = {
    "endpoint": "fal-ai/flux/dev",
    "prompt": "ein Löwe — 獅子 🦁",
    "seed": 2**53 - 4,
    "num_inference_steps": 28,
    "guidance_scale": 3.5,
    "width": 1024,
    "height": 768,
    "acceleration": "none",
}


def gradient() -> Image:
    """Return an image of many colours, so that the encoders have something to compress."""
    return PILImage.radial_gradient("L").convert("RGB").resize((96, 64))


def opened(content: bytes) -> Image:
    """Open an encoded image."""
    return PILImage.open(io.BytesIO(content))


def parameters_in(content: bytes) -> dict[str, Any]:
    """Return the generation parameters from the metadata of a file."""
    image = opened(content)
    if image.format == "PNG":
        return dict(json.loads(image.info["parameters"]))
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment.startswith(b"UNICODE\0")
    return dict(json.loads(comment.removeprefix(b"UNICODE\0").decode("utf-16-be")))


def test_every_format_has_a_content_type_and_an_extension() -> None:
    assert set(CONTENT_TYPES) == set(EXTENSIONS) == set(get_args(OutputFormat)) == set(FORMATS)


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_encoded_image_has_its_format_size_and_content_type(output_format: OutputFormat) -> None:
    image = opened(encode(gradient(), output_format, PARAMETERS))
    assert (image.format, image.size, image.mode) == (output_format.upper(), (96, 64), "RGB")
    assert PILImage.MIME[image.format or ""] == CONTENT_TYPES[output_format]


def test_png_is_lossless() -> None:
    assert opened(encode(gradient(), "png", PARAMETERS)).tobytes() == gradient().tobytes()


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("parameters", [PARAMETERS, None])
def test_every_image_is_marked_as_ai_generated(output_format: OutputFormat, parameters: dict[str, Any] | None) -> None:
    image = opened(encode(gradient(), output_format, parameters))
    xmp = image.info["xmp"].decode()
    assert MARK in xmp
    description = ElementTree.fromstring(xmp.partition("?>")[2])
    assert [entry.text for entry in description.iter(f"{{{IPTC}}}DigitalSourceType")] == [DIGITAL_SOURCE_TYPE]
    mark = image.info["Source"] if output_format == "png" else image.getexif()[ExifTags.Base.ImageDescription]
    assert mark == MARK == "AI generated"


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_file_contains_the_parameters(output_format: OutputFormat) -> None:
    assert parameters_in(encode(gradient(), output_format, PARAMETERS)) == PARAMETERS


@pytest.mark.parametrize("output_format", FORMATS)
def test_without_parameters_the_file_contains_nothing_of_the_request(output_format: OutputFormat) -> None:
    content = encode(gradient(), output_format, None)
    image = opened(content)
    assert "parameters" not in image.info
    assert ExifTags.Base.UserComment not in image.getexif().get_ifd(ExifTags.IFD.Exif)


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_same_image_and_parameters_give_the_same_bytes(output_format: OutputFormat) -> None:
    first, second = (encode(gradient(), output_format, dict(PARAMETERS)) for _ in range(2))
    assert first == second


LONG_PROMPTS = {
    "letters": "x" * MAX_PROMPT_LENGTH,
    "quotes": '"' * MAX_PROMPT_LENGTH,
    "backslashes": "\\" * MAX_PROMPT_LENGTH,
    "lines": "\n" * MAX_PROMPT_LENGTH,
    "umlauts": "ü" * MAX_PROMPT_LENGTH,
    "emoji": "🦁" * MAX_PROMPT_LENGTH,
    "emoji, cut in the middle": "x" + "🦁" * (MAX_PROMPT_LENGTH - 1),
    "control characters": "\x01" * MAX_PROMPT_LENGTH,
}


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("prompt", LONG_PROMPTS.values(), ids=LONG_PROMPTS)
def test_the_longest_prompt_of_any_kind_can_be_stored(output_format: OutputFormat, prompt: str) -> None:
    stored = parameters_in(encode(gradient(), output_format, {**PARAMETERS, "prompt": prompt}))
    assert {**stored, "prompt": ""} == {**PARAMETERS, "prompt": ""}
    assert stored["prompt"] == prompt or (stored["prompt"].endswith("…") and prompt.startswith(stored["prompt"][:-1]))
    assert len(stored["prompt"]) > 1000


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_prompt_of_usual_length_is_stored_in_full(output_format: OutputFormat) -> None:
    prompt = "A lion. " * 500
    assert parameters_in(encode(gradient(), output_format, {**PARAMETERS, "prompt": prompt}))["prompt"] == prompt


def test_encode_does_not_change_its_parameters() -> None:
    parameters = {"prompt": LONG_PROMPTS["letters"]}
    encode(gradient(), "jpeg", parameters)
    assert parameters == {"prompt": LONG_PROMPTS["letters"]}


def test_black_is_black_and_of_the_same_size() -> None:
    image = black(gradient())
    assert (image.size, image.getextrema()) == ((96, 64), ((0, 0), (0, 0), (0, 0)))
