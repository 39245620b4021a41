"""Checks on the header of a file with weights, run as a separate program: `weights_header.py FILE KIND`.

Reading a header holds Python's global lock, for seconds if the file is malicious, so a separate process reads it.
This module imports nothing of the server, so that the process starts quickly. The program prints why the file is
refused, and nothing if it is usable.
"""

import os
import re
import resource
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open

MAX_TENSORS = 20_000
#: The most metadata entries. Training programs write a few hundred.
MAX_METADATA = 4096
#: The longest side of a matrix; FLUX.1's widest layer has 15,360.
MAX_SIDE = 65_536
MAX_RANK = 1024
#: Valid tensor names. Libraries use names as regular expressions, and matching nested repetitions could take forever.
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,300}")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_MATRICES = ("lora_A", "lora_B", "lora_up", "lora_down", "lora.up", "lora.down")
#: For each kind of file, what it must hold, and parts of the names of which it must have one.
KINDS = {
    "lora": ("LoRA weights", _MATRICES),
    "control_net": ("weights of a control net in diffusers' layout", ("controlnet_x_embedder",)),
    "ip_adapter": ("weights of an IP adapter", ("ip_adapter", "to_k_ip")),
}


def problem(path: Path, kind: str) -> str:
    """Return why the file is not a usable one of a kind in KINDS; an empty string if it is usable."""
    what, parts = KINDS[kind]
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                return f"it holds {len(names)} tensors; at most {MAX_TENSORS} are allowed"
            if len(file.metadata() or ()) > MAX_METADATA:
                return f"its metadata has more than {MAX_METADATA} entries"
            if not any(part in name for name in names for part in parts):
                return f"it holds no {what}"
            tensors = ((name, file.get_slice(name)) for name in names)
            problems = (_tensor_problem(name, each.get_dtype(), each.get_shape()) for name, each in tensors)
            return next(filter(None, problems), "")
    except OSError as error:
        # Leave out the rest of the error's text, which names a path of the server.
        return f"it cannot be read: {error.strerror}"
    except (SafetensorError, ValueError) as error:
        return f"it is not a safetensors file: {str(error)[:500]}"


def _tensor_problem(name: str, dtype: str, shape: list[int]) -> str:
    if not _NAME.fullmatch(name):
        return f"{name[:200]!r} is not a valid tensor name"
    if dtype not in _FLOATS:
        return f"{name[:200]} is of type {dtype}, which is not a floating-point type"
    if len(shape) > 4 or max(shape, default=1) > MAX_SIDE:
        return f"{name[:200]} has the shape {shape[:8]}; at most 4 dimensions of at most {MAX_SIDE} are allowed"
    if any(part in name for part in _MATRICES) and len(shape) >= 2 and min(shape[:2]) > MAX_RANK:
        return f"{name[:200]} has the rank {min(shape[:2])}; at most {MAX_RANK} is allowed"
    return ""


if __name__ == "__main__":
    # Lower the priority of this process, so that it does not delay running requests.
    os.nice(10)
    # A core dump would hold the client's file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.buffer.write(problem(Path(sys.argv[1]), sys.argv[2]).encode("utf-8", "replace"))
