"""The decoding of an AVIF image, run as a separate program: `python -I avif_decoder.py FILE MAX_PIXELS`.

The coded image in an AVIF file can be far larger than the header says, and libavif decodes all of it: a file of 1 KB
can take gigabytes. So a process with little memory and time decodes it. This module imports nothing of the server, so
that the process starts quickly. The program writes the image as a PNG to the standard output, with its orientation. For
an image that cannot be used, it writes the reason to the standard error, and ends with one of the statuses below.
"""

import os
import resource
import sys

import PIL.Image
from PIL import AvifImagePlugin

#: The statuses for other formats, for an image of more than MAX_PIXELS, and for an image that cannot be decoded.
NOT_AVIF, TOO_LARGE, UNREADABLE = 10, 11, 12
#: Bytes of address space. An image of 16 megapixels with transparency and 8 bits a colour takes less than 384 MiB.
_MAX_BYTES = 640 * 2**20
#: Seconds of CPU time. An image of 16 megapixels takes a few.
_MAX_SECONDS = 30


def convert(path: str, max_pixels: int) -> int:
    """Write the first frame of an AVIF file as a PNG to the standard output; return the status."""
    try:
        with PIL.Image.open(path, formats=("AVIF",)) as image:
            if image.width * image.height > max_pixels:
                return TOO_LARGE
            exif = image.info.get("exif", b"")
            image.save(sys.stdout.buffer, "PNG", compress_level=1, icc_profile=None, exif=exif)
    except PIL.UnidentifiedImageError:
        return NOT_AVIF
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        return TOO_LARGE
    except Exception as error:
        sys.stderr.write(str(error)[:500])
        return UNREADABLE
    return 0


if __name__ == "__main__":
    # Lower the priority of this process, so that it does not delay running requests.
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_MAX_SECONDS, _MAX_SECONDS))
    # The stacks of more threads would count as address space.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    sys.exit(convert(sys.argv[1], int(sys.argv[2])))
