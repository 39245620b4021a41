"""The CPU's model and flags, and whether it is fast in bfloat16."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: The flags of instructions that speed up matrix products, as /proc/cpuinfo names them.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
#: PyTorch's names of instructions for bfloat16 products: the first two for Intel and AMD CPUs, the last for Arm CPUs.
_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")


def describe() -> str:
    """Describe the CPU by its model and its flags for matrix products, such as "AMD EPYC (avx2 avx512f)"."""
    entries = _cpuinfo()
    model = entries.get("model name") or platform.processor() or platform.machine()
    present = (entries.get("flags") or entries.get("Features") or "").split()
    flags = " ".join(flag for flag in _FLAGS if flag in present)
    return f"{model} ({flags})" if flags else model


def has_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 matrices natively.

    The CPU's flags decide, not a timing, so that the result and the images are the same after each restart.
    Without these flags, PyTorch emulates bfloat16, 40 to 500 times slower than float32 (pytorch/pytorch#146508).
    """
    import torch

    # Older versions of PyTorch and builds without oneDNN lack these functions. The CPU then counts as emulating.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    is_allowed = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    # `is_allowed` is also true on CPUs that emulate bfloat16. It is needed because it respects ONEDNN_MAX_CPU_ISA,
    # which makes oneDNN ignore newer instructions.
    return any(capabilities.get(name, False) for name in _BFLOAT16) and bool(is_allowed())


def _cpuinfo() -> dict[str, str]:
    """Return the entries of the first processor in /proc/cpuinfo; an empty dict if the file cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
