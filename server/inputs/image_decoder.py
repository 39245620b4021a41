"""The decoding of a GIF or an AVIF, run as a separate program: `image_decoder.py FILE MAX_PIXELS`.

Small files of these formats can take gigabytes. The coded image in an AVIF can be far larger than the header says, and
libavif decodes all of it. A GIF can have millions of blocks before its first image, and Pillow collects them. So a
process with little memory and time decodes them. This module imports nothing of the server, so that the process starts
quickly. The program writes the image as a PNG to the standard output, with its orientation. For an image that cannot be
used, it ends with one of the statuses below, and writes the reason to the standard error.
"""

import io
import resource
import sys

import PIL.Image
from PIL import AvifImagePlugin

#: The statuses for other formats, for an image of more than MAX_PIXELS, and for an image that cannot be decoded.
OTHER_FORMAT, TOO_LARGE, UNREADABLE = 10, 11, 12
#: Bytes of address space. An image of 16 megapixels with transparency and 8 bits a colour takes less than 384 MiB.
MAX_BYTES = 640 * 2**20
#: Seconds of CPU time, after which the system ends the process with SIGXCPU. An image of 16 megapixels takes a few.
MAX_SECONDS = 30
#: Bytes of output: a PNG of 16 megapixels with transparency that does not compress, and 25 MiB of EXIF data.
_MAX_OUTPUT = 96 * 2**20
#: The most reads of a file. A block before a GIF's first image takes two, and 64 KiB of the image itself take one.
_MAX_READS = 20_000


class _File(io.FileIO):
    """A file that can be read only a limited number of times."""

    num_reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as FileIO does. Raises ValueError after too many reads."""
        self.num_reads += 1
        if self.num_reads > _MAX_READS:
            raise ValueError("the file has too many blocks; save it again with another program")
        return super().read(size)


def convert(path: str, max_pixels: int) -> int:
    """Write the first frame of the image as a PNG to the standard output; return the status.

    Raises OSError with an error number for a fault of the machine, such as a full disk.
    """
    try:
        with _File(path) as file, PIL.Image.open(file, formats=("GIF", "AVIF")) as image:
            if image.width * image.height > max_pixels:
                return TOO_LARGE
            exif = image.info.get("exif", b"")
            image.save(sys.stdout.buffer, "PNG", compress_level=1, icc_profile=None, exif=exif)
    except PIL.UnidentifiedImageError:
        return OTHER_FORMAT
    except PIL.Image.DecompressionBombError:
        return TOO_LARGE
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        sys.stderr.write(str(error)[:500] or "its decoding takes too much memory")
        return UNREADABLE
    return 0


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    # At the second limit the system sends SIGKILL, which does not tell why.
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_OUTPUT, _MAX_OUTPUT))
    # A core dump would hold the client's image.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The stacks of more threads would count as address space.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    sys.exit(convert(sys.argv[1], int(sys.argv[2])))
