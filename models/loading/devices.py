"""Devices, their free memory, and the number type of their computation."""

from typing import TYPE_CHECKING

from models.base import EngineConfig
from models.loading import cpu

if TYPE_CHECKING:
    import torch


def device_for(name: str) -> str:
    """Return the device for "auto", "cuda" or "cpu". Raises OSError if the device cannot be used."""
    import torch

    if torch.version.hip:
        raise OSError("ROCm builds of PyTorch are not supported; install a CUDA or CPU build")
    if name == "cuda" and not torch.cuda.is_available():
        why = "finds no usable GPU or driver" if torch.version.cuda else "is a build without CUDA"
        raise OSError(f"--device cuda: PyTorch {torch.__version__} {why}")
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory(device: str) -> int:
    """Return the free bytes of the device, within this process's limit; on a CPU, of the machine's memory."""
    import psutil
    import torch

    if device == "cpu":
        return int(psutil.virtual_memory().available)
    free, total = torch.cuda.mem_get_info()
    limit = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    return int(min(free, limit))


def is_emulated(config: EngineConfig, dtype: "torch.dtype") -> bool:
    """Return whether a CPU emulates bfloat16, which was chosen because float32 did not fit."""
    import torch

    return config.dtype == "auto" and dtype == torch.bfloat16 and not cpu.has_bfloat16()


def type_name(dtype: "torch.dtype") -> str:
    """Return PyTorch's name of a type, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_for(name: str, device: str, num_bytes: int = 0) -> "torch.dtype":
    """Return the type for "auto", "bfloat16" or "float32", with `num_bytes` of weights stored in bf16.

    A GPU computes in bf16. A CPU computes in the type that its flags say it is fast in, but in float32 only if the
    weights fit into the machine's memory at twice their size. In bf16, the weights are mapped from their files.
    Raises OSError.
    """
    import psutil
    import torch

    if device == "cuda":
        if name == "float32":
            raise OSError("--dtype float32 is for CPUs; a GPU supports only bfloat16")
        return torch.bfloat16
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    fits = 2 * num_bytes <= psutil.virtual_memory().total
    return torch.float32 if fits and not cpu.has_bfloat16() else torch.bfloat16
