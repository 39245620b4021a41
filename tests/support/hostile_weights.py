"""Hostile and broken files of weights: each with what the error message must name."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: The start of a valid GGUF file of version 3: magic number and version.
GGUF = b"GGUF" + struct.pack("<I", 3)
UINT8, UINT32, TEXT, ARRAY, UINT64 = 0, 4, 8, 9, 10
F32, Q4_0, Q8_0 = 0, 2, 8


def safetensors(entries: Any, num_bytes: int = 64, length: int | None = None) -> bytes:
    """Return a safetensors file with this header, which may claim another length of the header."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(num_bytes)


def tensor(shape: Any = (4, 8), offsets: Any = (0, 64), dtype: Any = "BF16", **more: Any) -> dict[str, Any]:
    """Return an entry of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def text(value: bytes, length: int | None = None) -> bytes:
    """Return a text of a GGUF header, which may claim another length."""
    return struct.pack("<Q", len(value) if length is None else length) + value


def field(name: bytes, kind: int, value: bytes) -> bytes:
    """Return a metadata field of a GGUF header."""
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    """Return the value of an array of a GGUF header."""
    return struct.pack("<IQ", kind, count) + values


def info(name: bytes, shape: tuple[int, ...], kind: int = F32, offset: int = 0, dimensions: int | None = None) -> bytes:
    """Return a tensor of a GGUF header."""
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def gguf(infos: list[bytes], fields: list[bytes] | None = None, num_bytes: int = 4096, **claimed: int) -> bytes:
    """Return a GGUF file, which may claim other numbers of tensors and fields."""
    fields = fields or []
    counts = (claimed.get("num_tensors", len(infos)), claimed.get("num_fields", len(fields)))
    return GGUF + struct.pack("<QQ", *counts) + b"".join(fields) + b"".join(infos) + bytes(num_bytes)


def nested(depth: int) -> bytes:
    """Return arrays in arrays of a GGUF header."""
    return array(ARRAY, 1) * depth + array(UINT8, 0)


#: The content of each file, made when it is needed because some are large, and the words of its error message.
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "neither a safetensors file nor a GGUF file"),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), "neither a safetensors file nor a GGUF file"),
    "a pickle": (lambda: b"\x80\x02}q\x00.", "is a pickle, which can run code"),
    "a pickle in a zip file": (lambda: b"PK\x03\x04" + bytes(100), "is a pickle, which can run code"),
    "a header longer than the file": (
        lambda: safetensors({"a": tensor()}, length=2**62),
        "its header has 4611686018427387904 bytes",
    ),
    "a header of 9 MiB": (lambda: safetensors(b"{" + b" " * (9 * 2**20) + b"}"), "at most 8388608 are possible"),
    "a header that is no JSON": (lambda: safetensors(b'{"a": '), "the header is not valid JSON"),
    "a header nested deeply": (lambda: safetensors(b'{"a":' * 70_000), "the header is not valid JSON"),
    "a million objects": (
        lambda: safetensors(b'{"a":{"":{}' + b',"":{}' * 10**6 + b"}}"),
        "the header has 1000003 objects and lists",
    ),
    "lists nested deeply": (lambda: safetensors(b'{"a":' + b"[" * 70_000), "the header is not valid JSON"),
    "a number of a million digits": (
        lambda: safetensors(b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[' + b"9" * 10**6 + b"]}}"),
        "the header is not valid JSON",
    ),
    "a name twice": (
        lambda: safetensors(b'{"a":' + json.dumps(tensor()).encode() + b',"a":' + json.dumps(tensor()).encode() + b"}"),
        "'a' stands twice",
    ),
    "100,000 tensors": (
        lambda: safetensors({f"t{i}": tensor((0,), (0, 0)) for i in range(100_000)}),
        "the header has 300001 objects and lists, but at most 80000",
    ),
    "20,001 tensors": (
        lambda: safetensors({f"t{i}": tensor((0,), (0, 0)) for i in range(20_001)}),
        "has 20001 tensors, but at most 20000",
    ),
    "an entry that is no object": (lambda: safetensors({"x.y": 5}), "'x.y' should have dtype, shape and data_offsets"),
    "an entry with more": (lambda: safetensors({"x.y": tensor(code="os")}), "'x.y' should have dtype"),
    "an unknown type": (lambda: safetensors({"x.y": tensor(dtype="F4096")}), "'x.y' is of the unknown type 'F4096'"),
    "a list for a type": (lambda: safetensors({"x.y": tensor(dtype=["F32"])}), "'x.y' is of the unknown type"),
    "a negative shape": (lambda: safetensors({"x.y": tensor((-4, -8))}), "the shape of 'x.y' is [-4, -8]"),
    "a huge shape": (
        lambda: safetensors({"x.y": tensor((2**60, 2**60))}),
        f"'x.y' of shape [{2**60}, {2**60}] in BF16 takes {2**121} bytes",
    ),
    "a shape of 100,000 dimensions": (lambda: safetensors({"x.y": tensor([1] * 100_000)}), "the shape of 'x.y' is [1"),
    "a fraction in a shape": (lambda: safetensors({"x.y": tensor((4.5, 8))}), "the shape of 'x.y' is [4.5, 8]"),
    "offsets the wrong way": (
        lambda: safetensors({"x.y": tensor(offsets=(64, 0))}),
        "data_offsets of 'x.y' are [64, 0]",
    ),
    "offsets beyond the file": (
        lambda: safetensors({"x.y": tensor(offsets=(2**40, 2**40 + 64))}),
        "'x.y' ends at byte",
    ),
    "overlapping tensors": (
        lambda: safetensors({"x.y": tensor(), "x.z": tensor(offsets=(32, 96))}, 96),
        "'x.z' overlaps 'x.y'",
    ),
    "a tensor cut off": (lambda: safetensors({"x.y": tensor()}, num_bytes=63), "'x.y' ends at byte"),
    "a type that is no float": (
        lambda: safetensors({"x.y": tensor(dtype="I16")}),
        "'x.y' is of type I16, but weights should be",
    ),
    "GGUF cut off in the magic number": (lambda: GGUF[:6], "the version goes beyond the 6 bytes"),
    "GGUF of version 1": (lambda: b"GGUF" + struct.pack("<I", 1) + bytes(100), "of version 1, but only 2 and 3"),
    "GGUF for another byte order": (lambda: b"GGUF" + struct.pack(">I", 3) + bytes(100), "of version 50331648"),
    "GGUF with 2**63 tensors": (lambda: gguf([], num_tensors=2**63), f"claims {2**63} tensors, but at most 20000"),
    "GGUF with 2**60 fields": (lambda: gguf([], num_fields=2**60), f"claims {2**60} metadata fields, but at most 1000"),
    "GGUF with fewer fields than claimed": (lambda: gguf([], num_fields=900), "metadata field"),
    "GGUF with fewer tensors than claimed": (lambda: gguf([], num_tensors=20_000), "stands twice"),
    "GGUF with a name of 2**60 bytes": (
        lambda: gguf([], [text(b"general", 2**60)]),
        f"the name of a metadata field has {2**60} bytes",
    ),
    "GGUF with a text of 2**40 bytes": (
        lambda: gguf([], [field(b"general.name", TEXT, text(b"x", 2**40))]),
        f"'general.name' has {2**40} bytes, but at most",
    ),
    "GGUF with an array of 2**62 elements": (
        lambda: gguf([], [field(b"bomb", ARRAY, array(UINT64, 2**62))]),
        f"claims {2**62} elements of 'bomb', but at most 300000",
    ),
    "GGUF with 20 arrays of 300,000 numbers": (
        lambda: gguf([], [field(b"bomb%d" % i, ARRAY, array(UINT8, 300_000, bytes(300_000))) for i in range(20)]),
        "claims 300000 elements of 'bomb1', but at most 0",
    ),
    "GGUF with 290,000 texts": (
        lambda: gguf([], [field(b"tokens", ARRAY, array(TEXT, 290_000, text(b"") * 290_000))]),
        "holds no transformer of FLUX.1",
    ),
    "GGUF with an array cut off": (
        lambda: gguf([], [field(b"bomb", ARRAY, array(UINT64, 299_999))]),
        "'bomb' goes beyond the",
    ),
    "GGUF with arrays in arrays": (lambda: gguf([], [field(b"deep", ARRAY, nested(100_000))]), "'deep' holds arrays"),
    "GGUF with an unknown field": (lambda: gguf([], [field(b"odd", 77, b"")]), "'odd' is of the unknown type 77"),
    "GGUF with a field twice": (
        lambda: gguf([], [field(b"general.name", TEXT, text(b"x"))] * 2),
        "'general.name' stands twice",
    ),
    "GGUF with an alignment of 0": (
        lambda: gguf([info(b"x.y", (8,))], [field(b"general.alignment", UINT32, struct.pack("<I", 0))]),
        "general.alignment is 0, but should be a power of two",
    ),
    "GGUF with an alignment of 2**31": (
        lambda: gguf([info(b"x.y", (8,))], [field(b"general.alignment", UINT32, struct.pack("<I", 2**31))]),
        f"general.alignment is {2**31}",
    ),
    "GGUF with 2**31 dimensions": (lambda: gguf([info(b"x.y", (8,), dimensions=2**31)]), f"'x.y' has {2**31} dimens"),
    "GGUF with a huge shape": (lambda: gguf([info(b"x.y", (2**60, 2**60))]), "'x.y' ends at byte"),
    "GGUF with a shape that its blocks do not fit": (
        lambda: gguf([info(b"x.y", (33, 4), Q4_0)]),
        "'x.y' of shape [4, 33] cannot be of type Q4_0, whose blocks hold 32 numbers",
    ),
    "GGUF with an unknown type": (lambda: gguf([info(b"x.y", (8,), 99)]), "'x.y' is of the unknown type 99"),
    "GGUF with a type that diffusers lacks": (lambda: gguf([info(b"x.y", (256,), 16)]), "'x.y' is of type IQ2_XXS"),
    "GGUF with an odd offset": (lambda: gguf([info(b"x.y", (8,), offset=7)]), "the offset of 'x.y' is 7"),
    "GGUF with an offset beyond the file": (lambda: gguf([info(b"x.y", (8,), offset=2**50)]), "'x.y' ends at byte"),
    "GGUF with a tensor twice": (lambda: gguf([info(b"x.y", (8,))] * 2), "the tensor 'x.y' stands twice"),
    "GGUF with overlapping tensors": (
        lambda: gguf([info(b"x.y", (64,)), info(b"x.z", (64,), offset=32)]),
        "'x.z' overlaps 'x.y'",
    ),
    "GGUF with its tensors cut off": (lambda: gguf([info(b"x.y", (2048,))]), "'x.y' ends at byte"),
}


def write(directory: Path, name: str) -> Path:
    """Write one of the files; return its path."""
    path = directory / ("weights.gguf" if name.startswith("GGUF") else "weights.safetensors")
    path.write_bytes(FILES[name][0]())
    return path
