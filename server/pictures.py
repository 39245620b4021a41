"""Pictures as files: JPEG or PNG, marked as made by a machine."""

import io
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy
import PIL.Image
from PIL import ExifTags, ImageOps, PngImagePlugin
from PIL.Image import Image, new

from models.schema import Limits, OutputFormat
from server import picture_parts
from server.errors import Unusable

CONTENT_TYPES: dict[OutputFormat, str] = {"jpeg": "image/jpeg", "png": "image/png"}
ENDINGS: dict[OutputFormat, str] = {"jpeg": "jpg", "png": "png"}

MARK = "AI generated"
#: IPTC's word for media made by a trained algorithm (cv.iptc.org/newscodes/digitalsourcetype).
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
#: An EXIF block holds 64 KiB, two bytes a character; a longer prompt is cut to leave room for the rest.
MAX_PROMPT_CHARACTERS = 24_000

_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:dc="http://purl.org/dc/elements/1.1/">
<Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{mark}</rdf:li></rdf:Alt></dc:description>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""


#: What is read of a picture that a client sends.
SOURCE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_SOURCE_PIXELS = 16_000_000
# Pillow warns of each entry of bad metadata: one picture of less than a megabyte would fill the log with thirteen.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read(path: Path, limits: Limits) -> Image:
    """A client's picture as RGB: the right way up, its first frame, scaled down to the limits. Raises Unusable."""
    content = path.read_bytes()
    picture_parts.check(content)
    try:
        with PIL.Image.open(io.BytesIO(content), formats=SOURCE_FORMATS) as source:
            # What the header says, before anything is unpacked: a few hundred kilobytes can hold gigabytes.
            if source.width * source.height > MAX_SOURCE_PIXELS:
                raise _too_many_pixels(source.width, source.height)
            source.load()
            picture = _rgb(_upright(source))
    except Unusable:
        raise
    except PIL.UnidentifiedImageError:
        formats = [name.lower() for name in SOURCE_FORMATS]
        words = f"The file is not a picture in one of the formats {', '.join(formats)}"
        raise Unusable("unsupported_image_format", words, supported_formats=formats) from None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise _too_many_pixels() from None
    except Exception as error:
        raise Unusable("image_load_error", f"The picture cannot be read: {error}") from None
    fitting = min(
        1.0,
        limits.max_side / max(picture.size),
        math.sqrt(limits.max_pixels / (picture.width * picture.height)),
    )
    # A hair more, because 2215 * (2048 / 2215) is less than 2048 in floating point.
    width, height = (int(side * fitting + 1e-6) for side in picture.size)
    if min(width, height) < limits.min_side:
        raise Unusable(
            "image_too_small",
            f"The picture should be {limits.min_side} pixels wide and high at least"
            f", once it is at most {limits.max_side} pixels on its longer side",
            min_width=limits.min_side,
            min_height=limits.min_side,
        )
    return picture if fitting == 1 else picture.resize((width, height), PIL.Image.Resampling.LANCZOS)


def _too_many_pixels(*size: int) -> Unusable:
    shown = f"; it has {size[0]}x{size[1]}" if size else ""
    return Unusable(
        "image_too_large",
        f"The picture should have at most {MAX_SOURCE_PIXELS // 1_000_000} megapixels{shown}",
        max_width=4000,
        max_height=4000,
    )


def _upright(picture: Image) -> Image:
    """As its metadata say, where they can be read: many programs write bad ones."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:
        return picture


def _rgb(picture: Image) -> Image:
    """Eight bits a channel; Pillow itself would cut sixteen bits off instead of scaling them."""
    if picture.mode.startswith("I"):
        return PIL.Image.fromarray((numpy.asarray(picture).clip(0, 65535) // 257).astype(numpy.uint8)).convert("RGB")
    return picture.convert("RGB")


def black(picture: Image) -> Image:
    """What is shown instead of a flagged picture: the same size, all black."""
    return new("RGB", picture.size)


def encode(picture: Image, output_format: OutputFormat, parameters: Mapping[str, Any] | None) -> bytes:
    """The picture as a file. The same picture and parameters give the same bytes.

    JPEG quality 95 and PNG level 1 are what fal's own toolkit uses.
    """
    xmp = _XMP.format(source=escape(DIGITAL_SOURCE_TYPE), mark=MARK).encode()
    shown = json.dumps(_shortened(parameters), ensure_ascii=False) if parameters else None
    buffer = io.BytesIO()
    if output_format == "png":
        picture.save(buffer, "PNG", compress_level=1, pnginfo=_png_text(shown, xmp))
    else:
        picture.save(buffer, "JPEG", quality=95, exif=_exif(picture, shown), xmp=xmp)
    return buffer.getvalue()


def _png_text(shown: str | None, xmp: bytes) -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("Source", MARK)
    text.add_text("Software", "flux-server")
    if shown:
        text.add_itxt("parameters", shown)
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    return text


def _exif(picture: Image, shown: str | None) -> bytes:
    exif = picture.getexif()
    exif[ExifTags.Base.ImageDescription] = MARK
    exif[ExifTags.Base.Software] = "flux-server"
    if shown:
        # EXIF's own way of saying that a comment is Unicode.
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + shown.encode("utf-16-be")
    return exif.tobytes()


def _shortened(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with a prompt that is not too long once it is JSON, where a control character takes six places."""
    shown = dict(parameters)
    prompt = shown.get("prompt")
    while isinstance(prompt, str) and _length(prompt) > MAX_PROMPT_CHARACTERS:
        prompt = prompt[: len(prompt) * MAX_PROMPT_CHARACTERS // _length(prompt)]
        shown["prompt"] = f"{prompt}…"
    return shown


def _length(text: str) -> int:
    """UTF-16 units of the text as JSON."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-16-be")) // 2
