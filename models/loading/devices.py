"""The choice of device and number type, and the device's free memory."""

from typing import TYPE_CHECKING

from models.base import EngineConfig
from models.loading import cpu

if TYPE_CHECKING:
    import torch


def device_for(name: str) -> str:
    """Return "cuda" or "cpu" for `name`, which may also be "auto". Raises OSError if the device cannot be used."""
    import torch

    if torch.version.hip:
        raise OSError("ROCm builds of PyTorch are not supported; install a CUDA or CPU build")
    if name == "cuda" and not torch.cuda.is_available():
        raise OSError(f"--device cuda: {cuda_problem()}; or use --device cpu")
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def cuda_problem() -> str:
    """Return why PyTorch cannot use a GPU, and what to do."""
    import torch

    if not torch.version.cuda:
        return f"PyTorch {torch.__version__} lacks CUDA; install a build with CUDA"
    build = f"PyTorch {torch.__version__}, built for CUDA {torch.version.cuda}"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        # PyTorch's message names the driver's version if the driver is too old for this build.
        return f"{build}, says: {str(error).splitlines()[0].rstrip('.')}; check the driver"
    return f"{build}, finds no GPU; check CUDA_VISIBLE_DEVICES"


def free_memory(device: str) -> int:
    """Return the bytes that this process can still allocate on the GPU or, on a CPU, in the machine's memory."""
    import psutil
    import torch

    if device == "cpu":
        return int(psutil.virtual_memory().available)
    free, total = torch.cuda.mem_get_info()
    limit = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    return int(min(free, limit))


def is_emulated(config: EngineConfig, dtype: "torch.dtype") -> bool:
    """Return whether "auto" chose bfloat16 on a CPU that emulates it, because float32 does not fit in memory."""
    import torch

    return config.dtype == "auto" and dtype == torch.bfloat16 and not cpu.has_bfloat16()


def type_name(dtype: "torch.dtype") -> str:
    """Return PyTorch's name of a type, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_for(name: str, device: str, num_bytes: int = 0) -> "torch.dtype":
    """Return the number type for `name`, which is "auto", "bfloat16" or "float32".

    For "auto", a GPU computes in bf16, and so does a CPU that multiplies bf16 natively. Other CPUs compute in float32
    if the weights then fit into the memory: they take twice `num_bytes`, their size in bf16. If they do not fit, the
    CPU computes in bf16 too, because weights in bf16 can be read from their files again when memory is short.
    Raises OSError for float32 on a GPU.
    """
    import psutil
    import torch

    if device == "cuda":
        if name == "float32":
            raise OSError("--dtype float32 is for CPUs; on a GPU, use bfloat16 or auto")
        return torch.bfloat16
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    fits = 2 * num_bytes <= psutil.virtual_memory().total
    return torch.float32 if fits and not cpu.has_bfloat16() else torch.bfloat16
