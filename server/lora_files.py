"""LoRA files as they come from strangers: what they must be before anything reads them."""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from server.errors import Unusable

MAX_TENSORS = 20_000
#: Sides of a matrix; FLUX.1's widest layer has 15,360.
MAX_SIDE = 65_536
MAX_RANK = 1024
#: Of a tensor: libraries take these for regular expressions, and one with nested repetitions never ends.
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,300}")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_MATRICES = ("lora_A", "lora_B", "lora_up", "lora_down", "lora.up", "lora.down")


def check(path: Path) -> None:
    """Look at the header alone, so that a hostile file costs nothing. Raises Unusable."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise _bad(f"it holds {len(names)} tensors, and {MAX_TENSORS} are allowed")
            if not any(kind in name for name in names for kind in _MATRICES):
                raise _bad("it holds no LoRA weights")
            for name in names:
                tensor = file.get_slice(name)
                _check_one(name, tensor.get_dtype(), tensor.get_shape())
    except (SafetensorError, OSError, ValueError) as error:
        raise _bad(f"it is not a safetensors file: {error}") from None


def _check_one(name: str, dtype: str, shape: list[int]) -> None:
    if not _NAME.fullmatch(name):
        raise _bad(f"{name[:200]!r} is no name of a layer")
    if dtype not in _FLOATS:
        raise _bad(f"{name[:200]} is of type {dtype}, not of floating point numbers")
    if len(shape) > 4 or max(shape, default=1) > MAX_SIDE:
        raise _bad(f"{name[:200]} has the shape {shape[:8]}")
    if any(kind in name for kind in _MATRICES) and len(shape) >= 2 and min(shape[:2]) > MAX_RANK:
        raise _bad(f"{name[:200]} has the rank {min(shape[:2])}, and {MAX_RANK} is allowed")


def _bad(reason: str) -> Unusable:
    return Unusable("value_error", f"The LoRA cannot be used: {reason}")
