"""Checks on weights from clients, such as LoRAs, made before other code reads the files. All are untrusted."""

import struct
from pathlib import Path

from server.errors import InvalidInputFile
from server.inputs import weights_header
from server.inputs.child_process import run_program

#: The longest header, which holds the names, types and shapes of the tensors. Real files for FLUX.1 have headers of a
#: few hundred KiB.
MAX_HEADER_BYTES = 8 * 2**20
_LENGTH = struct.Struct("<Q")


def check(kind: str, path: Path) -> None:
    """Check the header of a file, of a kind in `weights_header.KINDS`, in another process. Blocks until that ends.

    Raises InvalidInputFile with the reason, and OSError and InternalError as `run_program` does.
    """
    _check_length(path)
    # For a bad file, the program prints the reason and exits normally.
    reason = run_program(weights_header, path, kind).output
    if reason:
        raise _bad(reason.decode("utf-8", "replace"))


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
    return InvalidInputFile("value_error", f"The weights cannot be used: {reason}")
