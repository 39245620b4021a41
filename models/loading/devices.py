"""Devices, their free memory, and the type that each computes in."""

from typing import TYPE_CHECKING

from models.base import EngineConfig
from models.loading import cpu

if TYPE_CHECKING:
    import torch


def device_for(name: str) -> str:
    """The device to use for "auto", "cuda" or "cpu". Raises OSError where it cannot be used."""
    import torch

    if torch.version.hip:
        raise OSError("ROCm builds of PyTorch are not supported: nobody has run this on one yet")
    if name == "cuda" and not torch.cuda.is_available():
        why = "finds no usable GPU or driver" if torch.version.cuda else "is a build without CUDA"
        raise OSError(f"--device cuda: PyTorch {torch.__version__} {why}")
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory(device: str) -> int:
    """Bytes of the device that can still be taken, by this process's own limit too; on the CPU, of the machine."""
    import psutil
    import torch

    if device == "cpu":
        return int(psutil.virtual_memory().available)
    free, total = torch.cuda.mem_get_info()
    limit = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    return int(min(free, limit))


def is_emulated(config: EngineConfig, dtype: "torch.dtype") -> bool:
    """Whether bfloat16 was chosen, on a CPU that is slow at it, because float32 did not fit."""
    import torch

    return config.dtype == "auto" and dtype == torch.bfloat16 and not cpu.has_bfloat16()


def type_name(dtype: "torch.dtype") -> str:
    """PyTorch's own, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_for(name: str, device: str, num_bytes: int = 0) -> "torch.dtype":
    """The type for "auto", "bfloat16" or "float32", and `num_bytes` of weights stored in bf16.

    A GPU computes in bf16. A CPU computes in what its flags say it is fast at, and in float32 only where the weights
    fit into the machine's memory at twice their size: in bf16 they are mapped from their files. Raises OSError.
    """
    import psutil
    import torch

    if device == "cuda":
        if name == "float32":
            raise OSError("--dtype float32 is for CPUs; on a GPU only bfloat16 is supported")
        return torch.bfloat16
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    fits = 2 * num_bytes <= psutil.virtual_memory().total
    return torch.float32 if fits and not cpu.has_bfloat16() else torch.bfloat16
