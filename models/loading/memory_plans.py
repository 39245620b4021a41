"""Memory plans: placements of FLUX's parts that fit the device's memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: Working memory of a generation, as a share of all weights in bf16: 4 GB for FLUX.1. Calculated for 1024x1024; not yet
#: measured on the real model.
WORKSPACE = 0.12
#: Size of FLUX.1's transformer in 8 bits as a share of bf16. The matrices of its norms, 27 % of it, stay in bf16.
FP8_SHARE = 0.64
#: The large parts of FLUX.1 [dev]; all others stay on the device in every plan.
_LARGE = ("transformer", "text_encoder_2")


@dataclass(frozen=True)
class Plan:
    """One way to place a pipeline.

    Attributes:
        name: its name for --memory.
        description: a summary for `doctor` and the log.
        required_bytes: bytes on the device, from the bytes of each component in bf16.
        apply: places the pipeline on the device.
        is_resident: whether all weights stay on the device unchanged, which compiled tiers require.
    """

    name: str
    description: str
    required_bytes: Callable[[Mapping[str, int]], float]
    apply: Callable[[Any, str], Any]
    is_resident: bool = False


def _resident(pipeline: Any, device: str) -> Any:
    return pipeline.to(device)


def _fp8_storage(pipeline: Any, device: str) -> Any:
    """Store the transformer's weights in 8 bits, and widen them layer by layer as they are used."""
    import torch

    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=pipeline.dtype)
    pipeline.transformer.to(device)
    _offload(pipeline.text_encoder_2.encoder, device)
    return _rest(pipeline, device)


def _group_offload(pipeline: Any, device: str) -> Any:
    """Copy blocks to the device as they are used, each while the one before runs."""
    _offload(pipeline.transformer, device)
    _offload(pipeline.text_encoder_2.encoder, device)
    return _rest(pipeline, device)


def _offload(module: Any, device: str) -> None:
    import torch
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        module,
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device == "cuda",
        # Pin blocks only as they are needed: pinning everything would keep a second copy in host memory.
        low_cpu_mem_usage=True,
    )


def _rest(pipeline: Any, device: str) -> Any:
    pipeline.text_encoder.to(device)
    pipeline.vae.to(device)
    return pipeline


def _small(sizes: Mapping[str, int]) -> float:
    """Return the small parts, the working memory, and a twelfth of the large parts for two blocks."""
    large = sum(sizes.get(name, 0) for name in _LARGE)
    return sum(sizes.values()) * (1 + WORKSPACE) - large * 11 / 12


#: From the fastest to the smallest.
PLANS = (
    Plan("resident", "all weights on the device", lambda sizes: sum(sizes.values()) * (1 + WORKSPACE), _resident, True),
    Plan(
        "fp8-storage",
        "the transformer in 8 bits, slightly different images; the text encoder loaded block by block",
        lambda sizes: _small(sizes) + sizes.get("transformer", 0) * FP8_SHARE,
        _fp8_storage,
    ),
    Plan("group-offload", "loaded block by block, the slowest", _small, _group_offload),
)
NAMES = ("auto", *(plan.name for plan in PLANS))


def fits_resident(sizes: Mapping[str, int], free: int) -> bool:
    """Return whether the unchanged weights and the working memory fit."""
    return PLANS[0].required_bytes(sizes) <= free


def choose(name: str, sizes: Mapping[str, int], free: int, *, device: str = "cuda") -> Plan:
    """Choose the plan of this name, or for "auto" the first that fits `free` bytes. Raises OSError if none does.

    A CPU needs no plan: weights are mapped from their files, and parts that do not fit are read again when used.
    """
    if device == "cpu" and name == "auto":
        return PLANS[0]
    for plan in PLANS:
        if plan.name == name or (name == "auto" and plan.required_bytes(sizes) <= free):
            return plan
    least = min(plan.required_bytes(sizes) for plan in PLANS)
    raise OSError(
        f"the device has {free / 1e9:.1f} GB free, and the weights need {least / 1e9:.1f} GB at least; "
        "--memory NAME forces a plan"
    )
