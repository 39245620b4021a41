"""Encoding of images as JPEG or PNG, marked as AI generated, with the parameters they were generated from."""

import io
import json
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

from PIL import ExifTags, PngImagePlugin
from PIL.Image import Image, new

from models.schema import OutputFormat

CONTENT_TYPES: dict[OutputFormat, str] = {"jpeg": "image/jpeg", "png": "image/png"}
EXTENSIONS: dict[OutputFormat, str] = {"jpeg": "jpg", "png": "png"}

MARK = "AI generated"
#: IPTC's term for media made by a trained algorithm (cv.iptc.org/newscodes/digitalsourcetype).
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
#: Maximum length of an embedded prompt as JSON, in UTF-16 units; longer ones are cut. An EXIF block holds 64 KiB, a
#: unit takes two bytes, and the other fields need room too.
MAX_PROMPT_CHARACTERS = 24_000

_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:dc="http://purl.org/dc/elements/1.1/">
<Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{mark}</rdf:li></rdf:Alt></dc:description>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""


def black(image: Image) -> Image:
    """Return a black image of the same size, to replace a flagged one."""
    return new("RGB", image.size)


def encode(image: Image, output_format: OutputFormat, parameters: Mapping[str, Any] | None) -> bytes:
    """Encode an image as a file, with `parameters` inside it unless they are None. Equal arguments give equal bytes.

    JPEG quality 95 and PNG level 1 are what fal's own toolkit uses.
    """
    xmp = _XMP.format(source=escape(DIGITAL_SOURCE_TYPE), mark=MARK).encode()
    text = json.dumps(_shorten(parameters), ensure_ascii=False) if parameters else None
    buffer = io.BytesIO()
    if output_format == "png":
        image.save(buffer, "PNG", compress_level=1, pnginfo=_png_text(text, xmp))
    else:
        image.save(buffer, "JPEG", quality=95, exif=_exif(image, text), xmp=xmp)
    return buffer.getvalue()


def _png_text(parameters: str | None, xmp: bytes) -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("Source", MARK)
    text.add_text("Software", "flux-server")
    if parameters:
        text.add_itxt("parameters", parameters)
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    return text


def _exif(image: Image, parameters: str | None) -> bytes:
    exif = image.getexif()
    exif[ExifTags.Base.ImageDescription] = MARK
    exif[ExifTags.Base.Software] = "flux-server"
    if parameters:
        # In EXIF, this prefix marks a comment in Unicode.
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + parameters.encode("utf-16-be")
    return exif.tobytes()


def _shorten(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with the prompt cut to MAX_PROMPT_CHARACTERS."""
    shortened = dict(parameters)
    prompt = shortened.get("prompt")
    while isinstance(prompt, str) and _length(prompt) > MAX_PROMPT_CHARACTERS:
        prompt = prompt[: len(prompt) * MAX_PROMPT_CHARACTERS // _length(prompt)]
        shortened["prompt"] = f"{prompt}…"
    return shortened


def _length(text: str) -> int:
    """Return the length of a text as JSON, in UTF-16 units. A control character takes six of them."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-16-be")) // 2
