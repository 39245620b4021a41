"""The placement of a pipeline on the device: which weights it keeps there, and in which form."""

from typing import Any

from models.loading import fp8, quantization


def resident(pipeline: Any, device: str) -> Any:
    """Keep all weights on the device."""
    return pipeline.to(device)


def in_fp8(pipeline: Any, device: str) -> Any:
    """Quantize the transformer matrix by matrix on the device; offload T5's blocks."""
    fp8.quantize(pipeline.transformer, device)
    offload(pipeline.text_encoder_2.encoder, device)
    return _rest(pipeline, device)


def fp8_storage(pipeline: Any, device: str) -> Any:
    """Keep the transformer on the device in 8 bits, widening each layer while it runs; offload T5's blocks."""
    import torch

    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=pipeline.dtype)
    pipeline.transformer.to(device)
    offload(pipeline.text_encoder_2.encoder, device)
    return _rest(pipeline, device)


def in_int8(pipeline: Any, device: str) -> Any:
    """Keep the transformer on the device in 8 bits; offload T5's blocks."""
    quantization.quantize(pipeline.transformer, "int8", device)
    offload(pipeline.text_encoder_2.encoder, device)
    return _rest(pipeline, device)


def in_int4(pipeline: Any, device: str) -> Any:
    """Keep the transformer and T5 on the device in 4 bits."""
    for name in ("transformer", "text_encoder_2"):
        quantization.quantize(getattr(pipeline, name), "int4", device)
    return _rest(pipeline, device)


def group_offload(pipeline: Any, device: str) -> Any:
    """Keep the blocks of transformer and T5 in host memory; copy each to the device while the block before it runs."""
    from diffusers.hooks import HookRegistry

    offload(pipeline.transformer, device)
    # Its layers outside of blocks, 0.13 GB, stay on the device after the first step. Otherwise each step would copy
    # them there and back while the CPU waits.
    registry = HookRegistry.check_if_exists_or_initialize(pipeline.transformer)
    registry.get_hook("group_offloading").group.offload_leader = None
    offload(pipeline.text_encoder_2.encoder, device)
    return _rest(pipeline, device)


def offload(module: Any, device: str) -> None:
    """Keep the blocks of a module in host memory, and copy each to the device while the block before it runs."""
    import torch
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        module,
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device == "cuda",
        low_cpu_mem_usage=not _can_pin(module),
    )


def _can_pin(module: Any) -> bool:
    """Return whether the host's memory has room for a second, pinned copy of all weights.

    Without such a copy, each block is pinned whenever it is copied to the GPU, so every step copies all weights twice.
    """
    import psutil

    # PyTorch rounds each pinned tensor up to a power of two. A tenth is left for other programs.
    num_bytes = sum(1 << (weight.nbytes - 1).bit_length() for weight in module.parameters())
    return bool(1.1 * num_bytes <= psutil.virtual_memory().available)


def _rest(pipeline: Any, device: str) -> Any:
    pipeline.text_encoder.to(device)
    pipeline.vae.to(device)
    return pipeline
