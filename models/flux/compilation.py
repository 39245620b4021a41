"""Ways to speed up clones of a transformer: compiled blocks, faster attention, and whether a copy in fp8 fits."""

import copy
import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D

from models.base import EngineConfig
from models.loading import fp8, memory_plans

log = logging.getLogger(__name__)

#: The most graphs of a kind of block. One more would be an error.
MAX_GRAPHS = 32


def clone_sharing_weights(module: Any) -> Any:
    """Clone a module without copying its weights. Compiling or quantizing the clone does not change the original."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def compile_blocks(transformer: Any) -> Any:
    """Compile each kind of block once, for images of any size. The compiler runs during the first forwards."""
    # A block has graphs for one image and several, with LoRAs and without, in each form of its weights.
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
    return transformer


def compiled_autoencoder(vae: Any) -> Any:
    """Return a clone of an AutoencoderKL with a faster decoder; None for other classes, whose decoders are small.

    Each kind of residual block is compiled once, for images of any size. The convolutions are in channels_last, the
    order in which GPUs compute them, so the clone has weights of its own for them: 100 MB for FLUX.1.
    """
    if not isinstance(vae, AutoencoderKL):
        return None
    clone = clone_sharing_weights(vae)
    for module in clone.decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            reordered = module.weight.detach().contiguous(memory_format=torch.channels_last)
            module.weight = torch.nn.Parameter(reordered, requires_grad=False)
        elif isinstance(module, ResnetBlock2D):
            # Some are the number 1 and some 1.0, for which the compiler would make two programs.
            module.output_scale_factor = float(module.output_scale_factor)
            module.forward = _in_channels_last(torch.compile(module.forward, fullgraph=True, dynamic=True))
    return clone


def _in_channels_last(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a block's forward that gets its input in channels_last, so that the compiler sees one order of numbers."""
    return lambda pixels, temb=None: forward(pixels.contiguous(memory_format=torch.channels_last), temb)


def has_faster_attention() -> bool:
    """Return whether `choose_attention` knows a faster attention for the GPU than PyTorch's default."""
    major, _ = torch.cuda.get_device_capability()
    return bool(major >= 9)


def choose_attention(transformer: Any) -> None:
    """Choose the fastest exact attention for the GPU.

    Hopper uses FlashAttention 3 if it is installed, else cuDNN. Later GPUs use cuDNN, earlier GPUs PyTorch's default.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    if not has_faster_attention():
        return
    major, _ = torch.cuda.get_device_capability()
    # Setting the backend of one transformer also changes the default for all others, so restore the default.
    before, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        transformer.set_attention_backend(
            "_flash_3" if major == 9 and find_spec("flash_attn_interface") else "_native_cudnn"
        )
    except (RuntimeError, ValueError) as error:
        log.warning("the fastest attention is not available, so PyTorch's default attention is used: %s", error)
    finally:
        _AttentionBackendRegistry.set_active_backend(before)


def set_compile_cache_dirs(config: EngineConfig) -> None:
    """Set where compiled code is kept on disk, if `compile_cache` is set.

    Environment variables that are set already keep their values.
    """
    directory = compile_cache_dir(config)
    if directory is None:
        return
    for name, part in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        (directory / part).mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(name, str(directory / part))


def compile_cache_dir(config: EngineConfig) -> Path | None:
    """Return the directory of compiled code: one per GPU model and combination of library versions."""
    if config.compile_cache is None:
        return None
    from importlib.metadata import version

    import diffusers

    triton, torchao = (version(name) if find_spec(name) else "none" for name in ("triton", "torchao"))
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    key = (
        f"torch-{torch.__version__} triton-{triton} torchao-{torchao} diffusers-{diffusers.__version__} {card}".replace(
            " ", "_"
        )
    )
    return config.compile_cache / key.replace("/", "-")


def fp8_copy_unavailable_reason(transformer: Any) -> str | None:
    """Return the reason why an fp8 copy of the transformer cannot be used; None if it can be used."""
    if reason := fp8.unavailable_reason():
        return reason
    free, _ = torch.cuda.mem_get_info()
    if (needed := fp8_copy_bytes(transformer)) > free:
        return f"a copy of the transformer in fp8 needs {needed / 1e9:.0f} GB, and only {free / 1e9:.0f} GB are free"
    return None


def fp8_copy_bytes(transformer: Any) -> int:
    """Return the bytes that an fp8 copy needs: one for each number, and the working memory of a generation."""
    matrices = [module for name, module in transformer.named_modules() if fp8.is_large_matrix(module, name)]
    working = memory_plans.reserve({"transformer": sum(weight.nbytes for weight in transformer.parameters())})
    copied: int = sum(matrix.weight.numel() for matrix in matrices)
    return copied + int(working)
