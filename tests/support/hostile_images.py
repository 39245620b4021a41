"""Files that a picture's address may lead to and that no honest program writes, and what each must come to."""

import io
import struct
import zlib
from typing import Any

import numpy
from PIL import Image


def encoded(picture: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def noise(width: int = 96, height: int = 80, channels: int = 3) -> Image.Image:
    """A picture without a pattern; the same each time."""
    values = numpy.random.default_rng(1).integers(0, 256, (height, width, channels), dtype=numpy.uint8)
    return Image.fromarray(values.squeeze())


def chunk(name: bytes, content: bytes = b"") -> bytes:
    """One part of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of chunks, whatever they say."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", head, *chunks, chunk(b"IEND")])


def pixels(width: int, height: int) -> bytes:
    """Black ones, in a chunk."""
    return chunk(b"IDAT", zlib.compress(bytes(height * (1 + 3 * width)), 9))


def jpeg_size(content: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header says another size."""
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


def scans(number: int) -> bytes:
    """A progressive JPEG at the limit of pixels, its shortest scan repeated: 36 bytes each, slow to decode."""
    content = encoded(Image.new("RGB", (4000, 4000), (10, 200, 30)), "JPEG", progressive=True)
    starts = [place for place in range(len(content)) if content.startswith(b"\xff\xda", place)]
    parts = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content) - 2], strict=True)]
    return content[:-2] + min(parts, key=len) * number + content[-2:]


def in_between(content: bytes, place: int, filling: bytes) -> bytes:
    return content[:place] + filling + content[place:]


PNG, JPEG, WEBP = (encoded(noise(), kind) for kind in ("PNG", "JPEG", "WEBP"))
PROGRESSIVE = encoded(noise(), "JPEG", progressive=True)
#: 231 kB that unpack to 81 megapixels.
BOMB = png(9000, 9000, pixels(9000, 9000))
FORMAT, SIZE, LOAD = "unsupported_image_format", "image_too_large", "image_load_error"
SMALL = "image_too_small"

#: Refused, with this type of error.
REFUSED: dict[str, tuple[bytes, str]] = {
    "bomb": (BOMB, SIZE),
    "a header that lies": (png(60_000, 60_000, chunk(b"IDAT", zlib.compress(b"x"))), SIZE),
    "a jpeg's header that lies": (jpeg_size(JPEG, 65_500, 65_500), SIZE),
    "a webp's header that lies": (WEBP[:12] + b"VP8X\x0a\0\0\0" + bytes(4) + b"\xff\x3f\0\xff\x3f\0" + WEBP[12:], SIZE),
    "4001 by 4000": (png(4001, 4000, pixels(4001, 4000)), SIZE),
    "no pixels": (png(96, 80), LOAD),
    "too few pixels": (png(96, 80, chunk(b"IDAT", zlib.compress(bytes(100)))), LOAD),
    "broken compression": (png(96, 80, chunk(b"IDAT", bytes(64))), LOAD),
    "a filter that is none": (png(96, 80, chunk(b"IDAT", zlib.compress(b"\x09" * 80 * 289))), LOAD),
    "no width": (png(0, 80, pixels(0, 80)), FORMAT),
    "width below zero": (png(2**32 - 1, 80, pixels(1, 80)), SIZE),
    "a depth that is none": (png(96, 80, pixels(96, 80), depth=7), FORMAT),
    "a colour type that is none": (png(96, 80, pixels(96, 80), colour=5), FORMAT),
    "no palette": (png(96, 80, chunk(b"IDAT", zlib.compress(b"\x09" * 80 * 97)), colour=3), LOAD),
    "text that unpacks for ever": (
        in_between(PNG, 33, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000), 9))),
        LOAD,
    ),
    "a profile that unpacks for ever": (
        in_between(PNG, 33, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000), 9))),
        LOAD,
    ),
    "two million chunks": (in_between(PNG, 33, chunk(b"aaAa") * 2_000_000), LOAD),
    "two million segments": (in_between(JPEG, 2, b"\xff\xe5\x00\x02" * 2_000_000), LOAD),
    "ten million fill bytes": (in_between(JPEG, 2, b"\xff" * 10_000_000), LOAD),
    "ten million bytes of nothing": (in_between(JPEG, 2, b"\xff\x00" * 5_000_000), LOAD),
    "ten thousand scans": (scans(10_000), LOAD),
    "cut short": (PNG[:2000], LOAD),
    "cut short jpeg": (JPEG[:900], LOAD),
    "cut short webp": (WEBP[:200], LOAD),
    "jpeg of no size": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", LOAD),
    "jpeg of no height": (jpeg_size(JPEG, 96, 0), FORMAT),
    "nothing": (b"", FORMAT),
    "text": (b"hello", FORMAT),
    "html": (b"<!doctype html><script>alert(1)</script>", FORMAT),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', FORMAT),
    "gif": (encoded(noise(), "GIF"), FORMAT),
    "tiff": (encoded(noise(), "TIFF"), FORMAT),
    "bmp": (encoded(noise(), "BMP"), FORMAT),
    "ico": (encoded(noise(), "ICO"), FORMAT),
    "tga": (encoded(noise(), "TGA"), FORMAT),
    "jpeg 2000": (b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(64), FORMAT),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", FORMAT),
    "pdf": (encoded(noise(), "PDF"), FORMAT),
    "a program": (b"\x7fELF" + bytes(64), FORMAT),
    "a header alone": (b"\x89PNG\r\n\x1a\n", FORMAT),
    "too small": (encoded(noise(63, 200)), SMALL),
    "a line": (encoded(Image.new("RGB", (4000, 100))), SMALL),
}

#: Odd, but a picture all the same, which is `noise()`.
TAKEN: dict[str, bytes] = {
    "a page behind it": PNG + b"<script>alert(1)</script>",
    "an archive behind it": encoded(noise(), "WEBP", lossless=True) + b"PK\x03\x04" + bytes(64),
    "chunks that nobody knows": in_between(PNG, 33, chunk(b"aaAa", bytes(1000)) * 100),
    "an orientation that is none": encoded(
        noise(), exif=b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 99, 0, 0)
    ),
    "metadata that are none": encoded(noise(), exif=b"Exif\0\0nonsense"),
    "a chunk longer than the file": PNG[:33] + b"\x7f\xff\xff\xff" + PNG[37:],
    "no end": PNG[:-12],
}
