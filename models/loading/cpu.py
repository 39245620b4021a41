"""The CPU's model, its flags, and the number type it is fastest in."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: The flags that decide how fast matrix products are, as Linux names them in /proc/cpuinfo.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
#: PyTorch's names for native bfloat16 products: on Intel and AMD, and on Arm.
_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")


def describe() -> str:
    """Describe the CPU for benchmark figures: its model and flags, such as "AMD EPYC (avx2 avx512f)"."""
    entries = _cpuinfo()
    model = entries.get("model name") or platform.processor() or platform.machine()
    present = (entries.get("flags") or entries.get("Features") or "").split()
    flags = " ".join(flag for flag in _FLAGS if flag in present)
    return f"{model} ({flags})" if flags else model


def has_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 matrices natively.

    The answer comes from the CPU's flags, not from timing, so that a restart gives the same bytes. Without these flags,
    PyTorch emulates bfloat16, 40 to 500 times slower than float32 (pytorch/pytorch#146508).
    """
    import torch

    # Both lookups need defaults: older PyTorch and builds without oneDNN lack them, and compute float32 fast.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    is_allowed = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    # `is_allowed` is also true where bfloat16 is emulated, but it respects ONEDNN_MAX_CPU_ISA for an older CPU.
    return any(capabilities.get(name, False) for name in _BFLOAT16) and bool(is_allowed())


def _cpuinfo() -> dict[str, str]:
    """Read the first processor's entries; none on systems without /proc."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
