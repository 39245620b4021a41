"""Checks on LoRA files from clients, made before other code reads the files. All are untrusted."""

import struct
import subprocess
import sys
from pathlib import Path

from server.errors import InternalError, InvalidInputFile
from server.inputs import lora_header

#: The longest header, which holds the names, types and shapes of the tensors. Real LoRAs for FLUX.1 have headers of a
#: few hundred KiB.
MAX_HEADER_BYTES = 8 * 2**20
#: Seconds that the process that checks a header may take; enough on a busy machine.
_SECONDS = 60.0
_LENGTH = struct.Struct("<Q")


def check(path: Path) -> None:
    """Check a LoRA file's header in another process. Blocks until the process ends.

    Raises InvalidInputFile with the reason, and InternalError when the process fails or takes too long.
    """
    _check_length(path)
    # With -I, Python uses nothing from the environment or the working directory.
    command = [sys.executable, "-I", lora_header.__file__, str(path)]
    try:
        done = subprocess.run(  # noqa: S603  a fixed program, and a path that the server made
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=True
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        # For a bad file, the program prints the reason and exits normally. So this is a fault of the machine.
        raise InternalError("The header of the LoRA file could not be checked; try again") from error
    if done.stdout:
        raise _bad(done.stdout.decode("utf-8", "replace"))


def check_start(start: bytes) -> None:
    """Check the first bytes of a file that is still arriving. Raises InvalidInputFile if its header is too long."""
    if len(start) >= _LENGTH.size and _LENGTH.unpack_from(start)[0] > MAX_HEADER_BYTES:
        raise _bad(f"its header is larger than {MAX_HEADER_BYTES // 2**20} MiB, or it is not a safetensors file")


def _check_length(path: Path) -> None:
    """Check that the header's length, in the first eight bytes, fits the file. Raises InvalidInputFile."""
    with path.open("rb") as file:
        first = file.read(_LENGTH.size)
    check_start(first)
    length = _LENGTH.unpack(first)[0] if len(first) == _LENGTH.size else 0
    if length == 0 or length > path.stat().st_size - _LENGTH.size:
        raise _bad(
            "it is not a complete safetensors file: the header length in its first eight bytes does not fit the file"
        )


def _bad(reason: str) -> InvalidInputFile:
    return InvalidInputFile("value_error", f"The LoRA cannot be used: {reason}")
