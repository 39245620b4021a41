"""Hostile and unusual files that an image URL may lead to, with the expected outcome of each."""

import base64
import struct
import zlib

from PIL import Image

from tests.support.image_files import encode, noise_image


def chunk(name: bytes, content: bytes = b"") -> bytes:
    """Encode one chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """Build a PNG of these chunks without validating them."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", head, *chunks, chunk(b"IEND")])


def pixels(width: int, height: int) -> bytes:
    """Encode black RGB pixels as an IDAT chunk."""
    return chunk(b"IDAT", zlib.compress(bytes(height * (1 + 3 * width)), 9))


def jpeg_size(content: bytes, width: int, height: int) -> bytes:
    """Return the JPEG with another size in its header and the same pixels."""
    offset = content.index(b"\xff\xc0") + 5
    return content[:offset] + struct.pack(">HH", height, width) + content[offset + 4 :]


def scans(number: int) -> bytes:
    """Build a progressive JPEG of the largest size allowed, in which `number` copies of the shortest scan are added.

    Such a scan takes 36 bytes and is slow to decode.
    """
    content = encode(Image.new("RGB", (4000, 4000), (10, 200, 30)), "JPEG", progressive=True)
    starts = [offset for offset in range(len(content)) if content.startswith(b"\xff\xda", offset)]
    parts = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content) - 2], strict=True)]
    return content[:-2] + min(parts, key=len) * number + content[-2:]


def in_between(content: bytes, offset: int, inserted: bytes) -> bytes:
    return content[:offset] + inserted + content[offset:]


def avif_size(content: bytes, width: int, height: int) -> bytes:
    """Return the AVIF with another size in its header and the same coded image."""
    offset = content.index(b"ispe") + 8
    return content[:offset] + struct.pack(">II", width, height) + content[offset + 8 :]


def gif_size(content: bytes, offset: int, width: int, height: int) -> bytes:
    """Return the GIF with another size at this offset: 6 for the screen."""
    return content[:offset] + struct.pack("<HH", width, height) + content[offset + 4 :]


def hide_blocks(extension: bytes, number: int) -> bytes:
    """Build a GIF with a comment of `number` blocks, behind an extension and a block that looks like an image."""
    return in_between(GIF, GIF_START, extension + b"," + bytes(44) + b"\0!\xfe" + b"\2ab" * number + b"\0")


PNG, JPEG, WEBP = (encode(noise_image(), kind) for kind in ("PNG", "JPEG", "WEBP"))
GIF, AVIF = encode(noise_image().quantize(), "GIF"), encode(noise_image(), "AVIF")
#: The end of a GIF's palette of 256 colours, where extensions and images follow.
GIF_START = 13 + 3 * 256
#: The starts of extensions whose next block is empty, after which Pillow reads one more list of blocks.
EMPTY_BLOCK, NETSCAPE = b"!\x01\0", b"!\xff\x0bNETSCAPE2.0\0"
_HIDDEN_PIXELS = (
    "eNpjYGBQSCupLEgsy0xjAAIQnZuZZpibmZjm62joCBR6nZtaksgAAYoZKTlFUDZDQWZyCQMa4CvILMkFsxiBWC4zJz8ZxHEB8RkhoozCDAw8"
    "vkC2RmZmXhpcrRSQk8oE5SWWGRg65+fkg+3KyiwoKgDS3pkFyflAWiSzuCAVal8CEAcAsUBBZkUmSICZg4MDSPEklhk6N9qD1Qgn5+cU5SXn"
    "VABN5mVgawAKiWcW5ML8BHQYCyNTMwtQU2huSmKJEAMXt/33uvqff5ewmEg5GO2WEFBTNCwquexrsHEDA0P8+VOahyqYKwvMZRtfibqX3Xtx"
    "/gqbpBy7lde0n7+2WMfzWn4rLZ0vwuz/ISLI212LX/57Masfk1TQ6mXzdI/e/m5jOPH/nx0GHZ6sDodCnWYelmSo9j5yQldz+r94leW9L0TE"
    "DySeP+USzfmFrc0hxSarXIQtefYOu6MMD94I3nz95/rruJw3//Z3L//da/Z3rlHKUfek71Jn3rV8tJZ+0Fkmfii30kZ0oVyRy/1X2+4bJp1M"
    "eWdQI1Jwp9nQqH76JObkwDftUbsWO+o30MGKeNKtaFXdcHQSf4bsRsW9T+c4XGPaKH3nylQbv7gFcQamX7+aG6suz5yxqN/+ueKH32LTDw2P"
    "YBqNidGYGI2J0ZgYjYnRmBiNidGYoE9MRNLMDwFD02haBbgBAHYNcPg="
)
#: An AVIF whose coded image has 16,000 x 16,000 pixels, and 96 x 80 according to its header. Making it takes a minute.
HIDDEN_PIXELS = zlib.decompress(base64.b64decode(_HIDDEN_PIXELS))
PROGRESSIVE = encode(noise_image(), "JPEG", progressive=True)
#: 231 kB that decompress to 81 megapixels.
BOMB = png(9000, 9000, pixels(9000, 9000))
FORMAT, SIZE, LOAD = "unsupported_image_format", "image_too_large", "image_load_error"
SMALL = "image_too_small"

#: Files that the server must refuse, each with the expected error type.
REFUSED: dict[str, tuple[bytes, str]] = {
    "bomb": (BOMB, SIZE),
    "a png with a false size": (png(60_000, 60_000, chunk(b"IDAT", zlib.compress(b"x"))), SIZE),
    "a jpeg with a false size": (jpeg_size(JPEG, 65_500, 65_500), SIZE),
    "a webp with a false size": (WEBP[:12] + b"VP8X\x0a\0\0\0" + bytes(4) + b"\xff\x3f\0\xff\x3f\0" + WEBP[12:], SIZE),
    "4001 by 4000": (png(4001, 4000, pixels(4001, 4000)), SIZE),
    "no pixels": (png(96, 80), LOAD),
    "too few pixels": (png(96, 80, chunk(b"IDAT", zlib.compress(bytes(100)))), LOAD),
    "broken compression": (png(96, 80, chunk(b"IDAT", bytes(64))), LOAD),
    "an invalid filter": (png(96, 80, chunk(b"IDAT", zlib.compress(b"\x09" * 80 * 289))), LOAD),
    "width 0": (png(0, 80, pixels(0, 80)), FORMAT),
    "negative width": (png(2**32 - 1, 80, pixels(1, 80)), SIZE),
    "an invalid bit depth": (png(96, 80, pixels(96, 80), depth=7), FORMAT),
    "an invalid colour type": (png(96, 80, pixels(96, 80), colour=5), FORMAT),
    "no palette": (png(96, 80, chunk(b"IDAT", zlib.compress(b"\x09" * 80 * 97)), colour=3), LOAD),
    "text that decompresses to 80 MB": (
        in_between(PNG, 33, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000), 9))),
        LOAD,
    ),
    "an ICC profile that decompresses to 80 MB": (
        in_between(PNG, 33, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000), 9))),
        LOAD,
    ),
    "two million chunks": (in_between(PNG, 33, chunk(b"aaAa") * 2_000_000), LOAD),
    "two million segments": (in_between(JPEG, 2, b"\xff\xe5\x00\x02" * 2_000_000), LOAD),
    "ten million fill bytes": (in_between(JPEG, 2, b"\xff" * 10_000_000), LOAD),
    "ten million stuffed bytes": (in_between(JPEG, 2, b"\xff\x00" * 5_000_000), LOAD),
    "ten thousand scans": (scans(10_000), LOAD),
    "truncated png": (PNG[:2000], LOAD),
    "truncated jpeg": (JPEG[:900], LOAD),
    "truncated webp": (WEBP[:200], LOAD),
    "a jpeg without a size": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", LOAD),
    "a jpeg of height 0": (jpeg_size(JPEG, 96, 0), FORMAT),
    "an empty file": (b"", FORMAT),
    "text": (b"hello", FORMAT),
    "html": (b"<!doctype html><script>alert(1)</script>", FORMAT),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', FORMAT),
    "a gif with a false size": (gif_size(GIF, 6, 65_535, 65_535), SIZE),
    "a gif with a frame larger than its screen": (
        gif_size(GIF, GIF.index(b",", GIF_START) + 5, 65_535, 65_535),
        SIZE,
    ),
    "a gif without an image": (GIF[:GIF_START] + b";", FORMAT),
    "a gif without pixels": (GIF[: GIF.index(b",", GIF_START) + 11] + b"\0;", LOAD),
    "two million extensions": (in_between(GIF, GIF_START, b"!\xfe\0" * 2_000_000), LOAD),
    "a comment of two million blocks": (in_between(GIF, GIF_START, b"!\xfe" + b"\1a" * 2_000_000 + b"\0"), LOAD),
    "two million blocks behind an empty block": (hide_blocks(EMPTY_BLOCK, 2_000_000), LOAD),
    "two million blocks behind an empty block of NETSCAPE2.0": (hide_blocks(NETSCAPE, 2_000_000), LOAD),
    "two million bytes outside extensions": (in_between(GIF, GIF_START, bytes(2_000_000)), LOAD),
    "truncated gif": (GIF[: GIF_START + 2000], LOAD),
    "an avif with a false size": (avif_size(AVIF, 9000, 9000), SIZE),
    "an avif with hidden pixels": (HIDDEN_PIXELS, LOAD),
    "truncated avif": (AVIF[: len(AVIF) // 2], FORMAT),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), FORMAT),
    "heic under another name": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(64), FORMAT),
    "tiff": (encode(noise_image(), "TIFF"), FORMAT),
    "bmp": (encode(noise_image(), "BMP"), FORMAT),
    "ico": (encode(noise_image(), "ICO"), FORMAT),
    "tga": (encode(noise_image(), "TGA"), FORMAT),
    "jpeg 2000": (b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(64), FORMAT),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", FORMAT),
    "pdf": (encode(noise_image(), "PDF"), FORMAT),
    "a program": (b"\x7fELF" + bytes(64), FORMAT),
    "a header alone": (b"\x89PNG\r\n\x1a\n", FORMAT),
    "too small": (encode(noise_image(63, 200)), SMALL),
    "too elongated": (encode(Image.new("RGB", (4000, 100))), SMALL),
}

#: Unusual files that the server must accept; each decodes to `noise_image()`.
ACCEPTED: dict[str, bytes] = {
    "a page after the image": PNG + b"<script>alert(1)</script>",
    "an archive after the image": encode(noise_image(), "WEBP", lossless=True) + b"PK\x03\x04" + bytes(64),
    "unknown chunks": in_between(PNG, 33, chunk(b"aaAa", bytes(1000)) * 100),
    "an invalid orientation": encode(
        noise_image(), exif=b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 99, 0, 0)
    ),
    "invalid metadata": encode(noise_image(), exif=b"Exif\0\0nonsense"),
    "a chunk longer than the file": PNG[:33] + b"\x7f\xff\xff\xff" + PNG[37:],
    "no end chunk": PNG[:-12],
}
