"""Ways to speed up clones of the models: compiled blocks, faster attention, and whether a copy in fp8 fits."""

import copy
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D

from models.base import EngineConfig
from models.loading import fp8
from models.loading.memory_plans import RESERVE

log = logging.getLogger(__name__)

#: The heights and widths of the latents in the decoder's warm-up. The first is that of 1024x1024.
_WARM_LATENTS = ((128, 128), (46, 34))


def clone_sharing_weights(module: Any) -> Any:
    """Clone a module without copying its weights. Compiling or quantizing the clone does not change the original."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def compile_blocks(transformer: Any) -> Any:
    """Compile each kind of block once, for images of any size. The compiler runs during the first forwards."""
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
    return transformer


def compile_decoder(vae: Any) -> Any:
    """Return a clone of an AutoencoderKL whose decoder's residual blocks are compiled, for images of any size.

    Each kind of block is compiled once; compiling the whole decoder takes many times as long. The clone has its own
    copy of the decoder's weights, in channels-last order, which convolutions on a GPU use: 0.1 GB for FLUX.1.
    """
    clone = clone_sharing_weights(vae)
    clone.decoder = copy.deepcopy(vae.decoder).to(memory_format=torch.channels_last)
    for module in clone.decoder.modules():
        if isinstance(module, ResnetBlock2D):
            module.compile(fullgraph=True, dynamic=True)
    return clone


def warm_up_decoder(vae: Any, device: str, dtype: torch.dtype) -> None:
    """Decode images of several sizes, so that no request waits for compilation.

    No side is a multiple of another, so that the compiler treats no side as a constant.
    """
    for height, width in _WARM_LATENTS:
        latents = torch.randn(1, vae.config.latent_channels, height, width, device=device, dtype=dtype)
        with torch.no_grad():
            vae.decode(latents, return_dict=False)


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
    matrices = [module for name, module in transformer.named_modules() if fp8.is_large_matrix(module, name)]
    # A byte for each number, and the working memory of a generation.
    needed = sum(matrix.weight.numel() for matrix in matrices)
    needed += int(RESERVE * sum(weight.nbytes for weight in transformer.parameters()))
    if needed > free:
        return f"a copy of the transformer in fp8 needs {needed / 1e9:.0f} GB, and only {free / 1e9:.0f} GB are free"
    return None
