"""The header of a file of weights, read before anything in the file is loaded: the place and shape of every tensor.

A header is untrusted. It is read in small pieces, and each number in it is compared with the size of the file before
memory is taken for it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.loading.hub import REPLACE, BadWeights

#: The most bytes of a header. FLUX.1's whole checkpoints have some 200 KB in safetensors files, and less in GGUF files.
MAX_HEADER_BYTES = 8 * 2**20
#: The most tensors of a file. FLUX.1's transformer has 780, and with text encoders and autoencoder it is 1,442.
MAX_TENSORS = 20_000
#: The bytes of a safetensors file that hold the length of its header.
LENGTH_BYTES = 8
#: The types of numbers in safetensors files, each with the bytes of one number.
_TYPES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a header describes it.

    Attributes:
        dtype: the type of its numbers, by the format's name, such as "BF16" or "Q4_0".
        shape: its shape in PyTorch's order.
        offset: the position of its first byte in the file.
        num_bytes: its bytes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """The number of its numbers."""
        return math.prod(self.shape)


def check_places(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Check that all tensors lie in the file, and that no two share a byte. Raises BadWeights."""
    num_bytes, end, before = path.stat().st_size, 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset < end:
            raise BadWeights(f"{path}: {quoted(name)} overlaps {quoted(before)}; {REPLACE}")
        end, before = tensor.offset + tensor.num_bytes, name
        if end > num_bytes:
            raise BadWeights(
                f"{path} was cut off, or its header is wrong: {quoted(name)} ends at byte {end},"
                f" but the file has {num_bytes} bytes; {REPLACE}"
            )


def quoted(name: str) -> str:
    """Return the name of a tensor or field for an error message: short, and without control characters."""
    return repr(name if len(name) <= 100 else f"{name[:100]}…")


def read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """Read the tensors of a safetensors file from its header. Raises BadWeights for a malformed header."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        limit = min(MAX_HEADER_BYTES, num_bytes - LENGTH_BYTES)
        if length > limit:
            raise BadWeights(
                f"{path} was cut off, or is not a safetensors file: its header has {length} bytes, but at most {limit}"
                f" are possible here; {REPLACE}"
            )
        text = file.read(length)
    # Counted before they are parsed, because each takes memory and time. A tensor has an object and two lists.
    num_containers, limit = text.count(b"{") + text.count(b"["), 4 * MAX_TENSORS
    if num_containers > limit:
        raise BadWeights(f"{path}: the header has {num_containers} objects and lists, but at most {limit} are allowed")
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadWeights(f"{path}: the header is not valid JSON: {str(error)[:200]}; {REPLACE}") from None
    # The metadata are texts about the file, which loading does not need.
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise BadWeights(f"{path} has {len(entries)} tensors, but at most {MAX_TENSORS} are allowed; {REPLACE}")
    tensors = {name: _tensor(path, name, entry, LENGTH_BYTES + length) for name, entry in entries.items()}
    check_places(path, tensors)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of JSON. Raises ValueError if it has a name twice, because parsers differ in which one counts."""
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"{quoted(name)} stands twice")
        entries[name] = value
    return entries


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadWeights(f"{path}: {quoted(name)} should have dtype, shape and data_offsets; {REPLACE}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise BadWeights(f"{path}: {quoted(name)} is of the unknown type {str(dtype)[:50]!r}; {REPLACE}")
    if not (_are_sizes(shape) and len(shape) <= 8):
        raise BadWeights(f"{path}: the shape of {quoted(name)} is {str(shape)[:100]}; {REPLACE}")
    if not (_are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise BadWeights(f"{path}: the data_offsets of {quoted(name)} are {str(offsets)[:100]}; {REPLACE}")
    tensor = TensorInfo(dtype, tuple(shape), start + offsets[0], offsets[1] - offsets[0])
    if (expected := tensor.num_elements * _TYPES[dtype]) != tensor.num_bytes:
        raise BadWeights(
            f"{path}: {quoted(name)} of shape {shape} in {dtype} takes {expected} bytes, but its data_offsets say"
            f" {tensor.num_bytes}; {REPLACE}"
        )
    return tensor


def _are_sizes(value: Any) -> bool:
    """Return whether a value of JSON is a list of integers that can be sizes. True and False are no integers here."""
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**63 for each in value)
