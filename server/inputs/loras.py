"""LoRA files as they come from strangers: what they must be before anything reads them."""

import struct
import subprocess
import sys
from pathlib import Path

from server.errors import InternalError, InvalidInputFile
from server.inputs import lora_header

#: Of the names, types and shapes at a file's beginning. Real LoRAs for FLUX.1 have some hundred KiB.
MAX_HEADER_BYTES = 8 * 2**20
#: How long reading one may take, on a machine that is busy.
_SECONDS = 60.0
_LENGTH = struct.Struct("<Q")


def check(path: Path) -> None:
    """Check a LoRA file by its header, in another process, and wait for it.

    Raises InvalidInputFile, with the reason, and InternalError where the process cannot be run.
    """
    _check_length(path)
    # -I: nothing from the environment or the folder that the server was started in.
    command = [sys.executable, "-I", lora_header.__file__, str(path)]
    try:
        done = subprocess.run(  # noqa: S603  a program of our own, and the path of a file of our own
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=True
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        # The machine's fault, not the file's.
        raise InternalError("The header of a LoRA file could not be looked at; try again") from error
    if done.stdout:
        raise _bad(done.stdout.decode("utf-8", "replace"))


def check_start(start: bytes) -> None:
    """Check the first bytes of a file that still comes. Raises InvalidInputFile for a header that is too long."""
    if len(start) >= _LENGTH.size and _LENGTH.unpack_from(start)[0] > MAX_HEADER_BYTES:
        raise _bad(f"its header is larger than {MAX_HEADER_BYTES // 2**20} MiB, or it is not a safetensors file")


def _check_length(path: Path) -> None:
    """The first eight bytes say how long the header is."""
    with path.open("rb") as file:
        first = file.read(_LENGTH.size)
    check_start(first)
    length = _LENGTH.unpack(first)[0] if len(first) == _LENGTH.size else 0
    if length == 0 or length > path.stat().st_size - _LENGTH.size:
        raise _bad("it is not a safetensors file: its header is not as long as it says")


def _bad(reason: str) -> InvalidInputFile:
    return InvalidInputFile("value_error", f"The LoRA cannot be used: {reason}")
