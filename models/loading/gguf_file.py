"""GGUF files, whose format https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes.

The reader of the package `gguf` takes memory and time for whatever a header claims, so headers are read here instead.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from models.loading.file_header import MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo, check_places, quoted
from models.loading.hub import REPLACE, BadWeights

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"
#: The most metadata fields, elements of all arrays in them, bytes of a text, and dimensions of a tensor. FLUX.1's files
#: have some ten fields without arrays; those of language models hold their vocabulary.
_MAX_FIELDS, _MAX_ELEMENTS, _MAX_TEXT, _MAX_DIMENSIONS = 1_000, 300_000, 2**20, 4
#: The types of metadata, by their numbers: fixed ones with their bytes, then texts and arrays.
_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _TEXT, _ARRAY = 4, 8, 9
#: The types that PyTorch has, with its names for them. diffusers takes bf16 as a quantization.
_PLAIN = {"F32": "float32", "F16": "float16"}
_DEFAULT_ALIGNMENT, _MIN_ALIGNMENT, _MAX_ALIGNMENT = 32, 8, 2**16
_MISSING = "GGUF files need the package gguf; run pip install 'flux-server[gguf]'"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the tensors of a GGUF file from its header.

    Raises BadWeights for a malformed header, and OSError if the package `gguf` is not installed.
    """
    if find_spec("gguf") is None:
        raise OSError(_MISSING)
    with path.open("rb") as file:
        reader = _Reader(path, file, min(MAX_HEADER_BYTES, path.stat().st_size))
        reader.skip(len(MAGIC), "the magic number")
        version = reader.number("<I", "the version")
        if version not in (2, 3):
            raise BadWeights(f"{path} is a GGUF file of version {version}, but only 2 and 3 are supported; {REPLACE}")
        num_tensors = reader.count(MAX_TENSORS, "tensors")
        alignment = _read_fields(reader, reader.count(_MAX_FIELDS, "metadata fields"))
        entries: dict[str, _Entry] = {}
        for _ in range(num_tensors):
            name = reader.text("the name of a tensor")
            if name in entries:
                raise BadWeights(f"{path}: the tensor {quoted(name)} stands twice; {REPLACE}")
            entries[name] = _read_entry(reader, name)
        start = -(-file.tell() // alignment) * alignment
    tensors = {name: _tensor(path, name, entry, start, alignment) for name, entry in entries.items()}
    check_places(path, tensors)
    return tensors


def load(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, "torch.Tensor"]:
    """Map tensors of a file into memory, as diffusers' `load_gguf_checkpoint` would read them.

    Quantized matrices become GGUFParameters, which GGUFLinear dequantizes in each forward. Other quantized tensors are
    dequantized here, because the modules that use them cannot do so.
    """
    import gguf
    import numpy
    import torch
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    # Copied on write, because PyTorch has no tensors that cannot be written to. Nothing writes to them.
    content = torch.from_numpy(numpy.memmap(path, mode="c"))
    loaded = {}
    for name, info in tensors.items():
        tensor = content[info.offset : info.offset + info.num_bytes]
        if info.dtype in _PLAIN:
            loaded[name] = tensor.view(getattr(torch, _PLAIN[info.dtype])).reshape(info.shape)
            continue
        rows = tensor.reshape(*info.shape[:-1], -1)
        parameter = GGUFParameter(rows, quant_type=gguf.GGMLQuantizationType[info.dtype])
        loaded[name] = parameter if len(info.shape) == 2 else dequantize_gguf_tensor(parameter)
    return loaded


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    type_number: int
    offset: int


class _Reader:
    """A reader of the numbers and texts of a header, which reads at most `limit` bytes."""

    def __init__(self, path: Path, file: BinaryIO, limit: int) -> None:
        self.path = path
        self.num_elements = 0
        self._file = file
        self._limit = limit

    def number(self, form: str, what: str) -> int:
        (value,) = struct.unpack(form, self._read(struct.calcsize(form), what))
        return int(value)

    def count(self, limit: int, what: str) -> int:
        """Read a number of things, of which there may be `limit`."""
        value = self.number("<Q", f"the number of {what}")
        if value > limit:
            raise BadWeights(f"{self.path} claims {value} {what}, but at most {limit} are allowed; {REPLACE}")
        return value

    def text(self, what: str) -> str:
        length = self.number("<Q", f"the length of {what}")
        if length > _MAX_TEXT:
            raise BadWeights(f"{self.path}: {what} has {length} bytes, but at most {_MAX_TEXT} are allowed; {REPLACE}")
        return self._read(length, what).decode(errors="replace")

    def skip(self, num_bytes: int, what: str) -> None:
        self._claim(num_bytes, what)
        self._file.seek(num_bytes, 1)

    def _read(self, num_bytes: int, what: str) -> bytes:
        self._claim(num_bytes, what)
        return self._file.read(num_bytes)

    def _claim(self, num_bytes: int, what: str) -> None:
        """Check that so many bytes follow. Raises BadWeights."""
        if self._file.tell() + num_bytes > self._limit:
            raise BadWeights(
                f"{self.path} was cut off, or its header is wrong: {what} goes beyond the {self._limit} bytes that the"
                f" header may take; {REPLACE}"
            )


def _read_fields(reader: _Reader, num_fields: int) -> int:
    """Read over the metadata; return the alignment of the tensors, the only field that matters here."""
    alignment, seen = _DEFAULT_ALIGNMENT, set()
    for _ in range(num_fields):
        name = reader.text("the name of a metadata field")
        if name in seen:
            raise BadWeights(f"{reader.path}: the metadata field {quoted(name)} stands twice; {REPLACE}")
        seen.add(name)
        kind = reader.number("<I", f"the type of {quoted(name)}")
        if name == "general.alignment" and kind == _UINT32:
            alignment = reader.number("<I", name)
            if alignment & (alignment - 1) or not _MIN_ALIGNMENT <= alignment <= _MAX_ALIGNMENT:
                raise BadWeights(f"{reader.path}: {name} is {alignment}, but should be a power of two; {REPLACE}")
        else:
            _skip_value(reader, kind, name)
    return alignment


def _skip_value(reader: _Reader, kind: int, name: str) -> None:
    if kind == _ARRAY:
        kind = reader.number("<I", f"the type of {quoted(name)}")
        if kind == _ARRAY:
            raise BadWeights(f"{reader.path}: the metadata field {quoted(name)} holds arrays in an array; {REPLACE}")
        count = reader.count(_MAX_ELEMENTS - reader.num_elements, f"elements of {quoted(name)}")
        reader.num_elements += count
    else:
        count = 1
    if kind in _FIXED:
        reader.skip(count * _FIXED[kind], quoted(name))
    elif kind == _TEXT:
        for _ in range(count):
            reader.text(f"a text of {quoted(name)}")
    else:
        raise BadWeights(f"{reader.path}: the metadata field {quoted(name)} is of the unknown type {kind}; {REPLACE}")


def _read_entry(reader: _Reader, name: str) -> _Entry:
    what = quoted(name)
    num_dimensions = reader.number("<I", f"the number of dimensions of {what}")
    if num_dimensions > _MAX_DIMENSIONS:
        raise BadWeights(
            f"{reader.path}: {what} has {num_dimensions} dimensions, but at most {_MAX_DIMENSIONS} are allowed;"
            f" {REPLACE}"
        )
    # GGUF lists the dimensions in the reverse of PyTorch's order.
    shape = tuple(reader.number("<Q", f"the shape of {what}") for _ in range(num_dimensions))[::-1]
    return _Entry(shape, reader.number("<I", f"the type of {what}"), reader.number("<Q", f"the offset of {what}"))


def _tensor(path: Path, name: str, entry: _Entry, start: int, alignment: int) -> TensorInfo:
    import gguf
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    try:
        kind = gguf.GGMLQuantizationType(entry.type_number)
    except ValueError:
        raise BadWeights(f"{path}: {quoted(name)} is of the unknown type {entry.type_number}; {REPLACE}") from None
    if kind.name not in _PLAIN and kind not in SUPPORTED_GGUF_QUANT_TYPES:
        known = ", ".join((*_PLAIN, *(each.name for each in SUPPORTED_GGUF_QUANT_TYPES)))
        raise BadWeights(f"{path}: {quoted(name)} is of type {kind.name}, but diffusers supports only {known}")
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if not entry.shape or entry.shape[-1] % block_size:
        raise BadWeights(
            f"{path}: {quoted(name)} of shape {list(entry.shape)} cannot be of type {kind.name}, whose blocks hold"
            f" {block_size} numbers; {REPLACE}"
        )
    if entry.offset % alignment:
        raise BadWeights(
            f"{path}: the offset of {quoted(name)} is {entry.offset}, not a multiple of {alignment}; {REPLACE}"
        )
    tensor = TensorInfo(kind.name, entry.shape, start + entry.offset, 0)
    return TensorInfo(kind.name, entry.shape, tensor.offset, tensor.num_elements // block_size * block_bytes)
