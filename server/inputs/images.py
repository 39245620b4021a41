"""Images that clients send: checked, and decoded as RGB. All are untrusted.

The structure of a file is checked before it is decoded, because a small file can keep a decoder busy for hours.
Measured with Pillow 12 on one core: each scan of a 16-megapixel JPEG takes 11 ms and needs only 36 bytes; two million
empty PNG chunks, or JPEG segments, take several seconds in which no other thread runs.
"""

import io
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import PIL.Image
from PIL import ImageOps, features
from PIL.Image import Image

from models.image_size import Limits
from server.errors import InvalidInputFile
from server.inputs import image_decoder
from server.inputs.child_process import run_program

#: The formats that are decoded in this process. Another process decodes the others.
_DECODED_HERE = ("PNG", "JPEG", "WEBP")
#: The formats that are accepted. Pillow can be built without AVIF.
SOURCE_FORMATS = (*_DECODED_HERE, "GIF", *(("AVIF",) if features.check("avif") else ()))
MAX_SOURCE_PIXELS = 16_000_000
# Pillow warns of each bad metadata entry: an image of less than a megabyte could write thirteen megabytes of log.
warnings.filterwarnings("ignore", module=r"PIL\.")
#: The most scans of a JPEG. Real encoders write a dozen at most.
MAX_SCANS = 100
#: The most chunks of a PNG or segments of a JPEG. A PNG of 25 MiB has 6400 chunks of 4 KiB, which some encoders write.
MAX_PARTS = 10_000
_PNG, _JPEG, _GIF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", (b"GIF87a", b"GIF89a")
#: The starts of an AVIF file after its first four bytes. With the last two, other formats are possible too.
_AVIF = (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1")
#: Limits how many processes decode images at a time, because each may take `image_decoder.MAX_BYTES`.
_PROCESSES = threading.BoundedSemaphore(2)
#: The exit statuses of such a process that are not a fault of the server: success, and what a bad image causes.
_EXPECTED = (0, image_decoder.OTHER_FORMAT, image_decoder.TOO_LARGE, image_decoder.UNREADABLE, -signal.SIGXCPU)
_START_OF_SCAN = b"\xff\xda"
#: Markers without a length: TEM, and RST0 to EOI.
_ALONE = (0x01, *range(0xD0, 0xDA))


def decode_image(path: Path, limits: Limits) -> Image:
    """Decode a client's image; return its first frame as RGB, upright, and scaled down to the limits.

    Raises InvalidInputFile for an image that cannot be used, OSError when the file cannot be read, and InternalError as
    `run_program` does.
    """
    return _decode(path, limits, _rgb)


def decode_transparency(path: Path, limits: Limits) -> Image:
    """Decode a client's image as `decode_image` does; return a mask, white where the image is transparent.

    Raises as `decode_image` does, also for an image without transparency.
    """
    return _decode(path, limits, _transparency)


def _decode(path: Path, limits: Limits, convert: Callable[[Image], Image]) -> Image:
    content = path.read_bytes()
    if content.startswith(_GIF) or ("AVIF" in SOURCE_FORMATS and content[4:12] in _AVIF):
        content = _decode_in_process(path)
    _check_parts(content)
    try:
        with PIL.Image.open(io.BytesIO(content), formats=_DECODED_HERE) as source:
            # The size in the header is checked before decoding: a few hundred kilobytes can decode to gigabytes.
            if source.width * source.height > MAX_SOURCE_PIXELS:
                raise _too_many_pixels_error(source.width, source.height)
            source.load()
            image = convert(_upright(source))
    except InvalidInputFile:
        raise
    except PIL.UnidentifiedImageError:
        raise _format_error() from None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise _too_many_pixels_error() from None
    except Exception as error:
        raise InvalidInputFile("image_load_error", f"The image cannot be read: {error}") from None
    return _scale_down(image, limits)


def _scale_down(image: Image, limits: Limits) -> Image:
    scale = min(
        1.0,
        limits.max_side / max(image.size),
        math.sqrt(limits.max_pixels / (image.width * image.height)),
    )
    # The small addition is needed because 2215 * (2048 / 2215) is less than 2048 in floating point.
    width, height = (int(side * scale + 1e-6) for side in image.size)
    if min(width, height) < limits.min_side:
        raise InvalidInputFile(
            "image_too_small",
            f"The image should be at least {limits.min_side} pixels wide and high, also after it is scaled down to"
            f" sides of at most {limits.max_side} pixels and an area of at most {limits.max_pixels} pixels",
            min_width=limits.min_side,
            min_height=limits.min_side,
        )
    return image if scale == 1 else image.resize((width, height), PIL.Image.Resampling.LANCZOS)


def _format_error() -> InvalidInputFile:
    formats = [name.lower() for name in SOURCE_FORMATS]
    message = f"The file is not an image in one of the formats {', '.join(formats)}"
    return InvalidInputFile("unsupported_image_format", message, supported_formats=formats)


def _too_many_pixels_error(*size: int) -> InvalidInputFile:
    actual = f"; it has {size[0]}x{size[1]} pixels" if size else ""
    return InvalidInputFile(
        "image_too_large",
        f"The image should have at most {MAX_SOURCE_PIXELS // 1_000_000} megapixels{actual}",
        max_width=4000,
        max_height=4000,
    )


def _upright(image: Image) -> Image:
    """Rotate an image as its metadata says. Ignore unreadable metadata, because many programs write such metadata."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _rgb(image: Image) -> Image:
    """Convert to RGB with eight bits per channel. Pillow alone clips sixteen-bit values instead of scaling them."""
    if image.mode.startswith("I"):
        return PIL.Image.fromarray((numpy.asarray(image).clip(0, 65535) // 257).astype(numpy.uint8)).convert("RGB")
    return image.convert("RGB")


def _transparency(image: Image) -> Image:
    if not image.has_transparency_data:
        message = "The mask has no transparency; save it as a PNG with an alpha channel, transparent where to repaint"
        raise InvalidInputFile("value_error", message)
    return ImageOps.invert(image.convert("RGBA").getchannel("A"))


def _decode_in_process(path: Path) -> bytes:
    """Decode a GIF or an AVIF in another process; return its first frame as a PNG.

    Raises InvalidInputFile for a bad image, and OSError and InternalError as `run_program` does.
    """
    with _PROCESSES:
        done = run_program(image_decoder, path, str(MAX_SOURCE_PIXELS), expected=_EXPECTED)
    if done.status == image_decoder.OTHER_FORMAT:
        raise _format_error()
    if done.status == image_decoder.TOO_LARGE:
        raise _too_many_pixels_error()
    if done.status:
        too_slow = f"its decoding takes more than {image_decoder.MAX_SECONDS} seconds"
        reason = done.errors if done.status == image_decoder.UNREADABLE else too_slow
        raise InvalidInputFile("image_load_error", f"The image cannot be read: {reason}")
    return done.output


def _check_parts(content: bytes) -> None:
    """Check the number of scans and segments of a JPEG, or of chunks of a PNG.

    Raises InvalidInputFile for too many.
    """
    parts: Iterator[int] = iter(())
    if content.startswith(_PNG):
        parts = _chunks(content)
    elif content.startswith(_JPEG):
        # Compressed data never contains 0xFF 0xDA. So each match is a scan of the image, or lies in its metadata, for
        # example in a thumbnail.
        if content.count(_START_OF_SCAN) > MAX_SCANS:
            raise InvalidInputFile(
                "image_load_error", f"The image has more than {MAX_SCANS} scans; save it as a baseline JPEG"
            )
        parts = _segments(content)
    for number, _ in enumerate(parts):
        if number == MAX_PARTS:
            problem = f"The image file has more than {MAX_PARTS} chunks or segments"
            raise InvalidInputFile("image_load_error", f"{problem}; save it again with another program")


def _chunks(content: bytes) -> Iterator[int]:
    """Yield the offset of each chunk of a PNG: four bytes of length, four of name, the content, four of checksum."""
    place = len(_PNG)
    while place + 8 <= len(content):
        yield place
        place += 12 + int.from_bytes(content[place : place + 4], "big")


def _segments(content: bytes) -> Iterator[int]:
    """Yield the offset of each segment of a JPEG before its first scan. A byte outside segments counts as a segment."""
    place = len(_JPEG)
    while place + 4 <= len(content) and content[place : place + 2] != _START_OF_SCAN:
        yield place
        if content[place] != 0xFF or content[place + 1] in (0x00, 0xFF):
            place += 1
        elif content[place + 1] in _ALONE:
            place += 2
        else:
            place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
