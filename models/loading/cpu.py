"""What this CPU is, and which numbers it computes fastest in."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: The flags that decide how fast matrix products are, as Linux names them in /proc/cpuinfo.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
#: PyTorch's names for native bfloat16 products: on Intel and AMD, and on Arm.
_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")


def describe() -> str:
    """The model and its flags, such as "AMD EPYC (avx2 avx512f)": stands beside every figure."""
    found = _cpuinfo()
    model = found.get("model name") or platform.processor() or platform.machine()
    present = (found.get("flags") or found.get("Features") or "").split()
    flags = " ".join(flag for flag in _FLAGS if flag in present)
    return f"{model} ({flags})" if flags else model


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices natively.

    Told by its flags and not by a stopwatch, so that a restart gives the same bytes. Without them PyTorch emulates
    bfloat16, 40 to 500 times slower than float32 (pytorch/pytorch#146508).
    """
    import torch

    # Looked for, because builds of PyTorch without oneDNN, and older ones, lack them: there float32 is never slow.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    is_allowed = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    # The second is true where bfloat16 is emulated, too, but knows when ONEDNN_MAX_CPU_ISA asks for an older CPU.
    return any(capabilities.get(name, False) for name in _BFLOAT16) and bool(is_allowed())


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries; none on systems without /proc."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
