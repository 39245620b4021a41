"""Pictures as files."""

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


def picture() -> Image:
    """Not of one colour, so that an encoder has something to do."""
    return PILImage.radial_gradient("L").convert("RGB").resize((96, 64))


def opened(content: bytes) -> Image:
    """Read back."""
    return PILImage.open(io.BytesIO(content))


def parameters_in(content: bytes) -> dict[str, Any]:
    """What the file says it was made from."""
    found = opened(content)
    if found.format == "PNG":
        return dict(json.loads(found.info["parameters"]))
    comment = found.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment.startswith(b"UNICODE\0")
    return dict(json.loads(comment.removeprefix(b"UNICODE\0").decode("utf-16-be")))


def test_every_format_has_a_content_type_and_an_ending() -> None:
    assert set(CONTENT_TYPES) == set(EXTENSIONS) == set(get_args(OutputFormat)) == set(FORMATS)


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_file_is_what_it_says_it_is(output_format: OutputFormat) -> None:
    found = opened(encode(picture(), output_format, PARAMETERS))
    assert (found.format, found.size, found.mode) == (output_format.upper(), (96, 64), "RGB")
    assert PILImage.MIME[found.format or ""] == CONTENT_TYPES[output_format]


def test_png_is_lossless() -> None:
    assert opened(encode(picture(), "png", PARAMETERS)).tobytes() == picture().tobytes()


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("parameters", [PARAMETERS, None])
def test_every_picture_says_that_a_machine_made_it(
    output_format: OutputFormat, parameters: dict[str, Any] | None
) -> None:
    found = opened(encode(picture(), output_format, parameters))
    xmp = found.info["xmp"].decode()
    assert MARK in xmp
    described = ElementTree.fromstring(xmp.partition("?>")[2])
    assert [entry.text for entry in described.iter(f"{{{IPTC}}}DigitalSourceType")] == [DIGITAL_SOURCE_TYPE]
    mark = found.info["Source"] if output_format == "png" else found.getexif()[ExifTags.Base.ImageDescription]
    assert mark == MARK == "AI generated"


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_parameters_are_in_the_file(output_format: OutputFormat) -> None:
    assert parameters_in(encode(picture(), output_format, PARAMETERS)) == PARAMETERS


@pytest.mark.parametrize("output_format", FORMATS)
def test_without_parameters_the_file_tells_nothing_of_the_request(output_format: OutputFormat) -> None:
    content = encode(picture(), output_format, None)
    found = opened(content)
    assert "parameters" not in found.info
    assert ExifTags.Base.UserComment not in found.getexif().get_ifd(ExifTags.IFD.Exif)


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_same_picture_and_parameters_give_the_same_bytes(output_format: OutputFormat) -> None:
    first, second = (encode(picture(), output_format, dict(PARAMETERS)) for _ in range(2))
    assert first == second


LONG = {
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
@pytest.mark.parametrize("prompt", LONG.values(), ids=LONG)
def test_the_longest_prompt_of_any_kind_can_be_stored(output_format: OutputFormat, prompt: str) -> None:
    shown = parameters_in(encode(picture(), output_format, {**PARAMETERS, "prompt": prompt}))
    assert {**shown, "prompt": ""} == {**PARAMETERS, "prompt": ""}
    assert shown["prompt"] == prompt or (shown["prompt"].endswith("…") and prompt.startswith(shown["prompt"][:-1]))
    assert len(shown["prompt"]) > 1000


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_prompt_of_usual_length_is_stored_whole(output_format: OutputFormat) -> None:
    prompt = "A lion. " * 500
    assert parameters_in(encode(picture(), output_format, {**PARAMETERS, "prompt": prompt}))["prompt"] == prompt


def test_what_was_given_is_not_changed() -> None:
    given = {"prompt": LONG["letters"]}
    encode(picture(), "jpeg", given)
    assert given == {"prompt": LONG["letters"]}


def test_black_is_black_and_of_the_same_size() -> None:
    found = black(picture())
    assert (found.size, found.getextrema()) == ((96, 64), ((0, 0), (0, 0), (0, 0)))
