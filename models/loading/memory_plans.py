"""Memory plans: how FLUX's parts are placed so that they fit the device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: What painting needs beside the weights, as a share of all of them in bf16: 4 GB for FLUX.1. By calculation for
#: 1024x1024; not yet measured on the real model.
WORKSPACE = 0.12
#: What is left of FLUX.1's transformer in 8 bits: the matrices of its norms, 27 % of it, stay in bf16.
FP8_SHARE = 0.64
#: The parts that are large in FLUX.1 [dev]; the others stay on the device in every plan.
_LARGE = ("transformer", "text_encoder_2")


@dataclass(frozen=True)
class Plan:
    """One way to place a pipeline.

    Attributes:
        name: what the operator calls it.
        words: what it does, for `doctor` and the log.
        needs: bytes on the device, from the bytes of each component in bf16.
        place: puts the pipeline on the device.
        is_whole: whether every weight stays on the device as it is, which compiled tiers ask for.
    """

    name: str
    description: str
    required_bytes: Callable[[Mapping[str, int]], float]
    apply: Callable[[Any, str], Any]
    is_resident: bool = False


def _resident(pipeline: Any, device: str) -> Any:
    return pipeline.to(device)


def _fp8_storage(pipeline: Any, device: str) -> Any:
    """The transformer's weights are kept in 8 bits and widened layer by layer as they are used."""
    import torch

    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=pipeline.dtype)
    pipeline.transformer.to(device)
    _offload(pipeline.text_encoder_2.encoder, device)
    return _rest(pipeline, device)


def _group_offload(pipeline: Any, device: str) -> Any:
    """Blocks come to the device as they are used, each on its way while the one before works."""
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
        # Pinned as it is needed: pinning all of it would be a second copy in the host's memory.
        low_cpu_mem_usage=True,
    )


def _rest(pipeline: Any, device: str) -> Any:
    pipeline.text_encoder.to(device)
    pipeline.vae.to(device)
    return pipeline


def _small(sizes: Mapping[str, int]) -> float:
    """The small parts and the work, and a twelfth of the large ones: a block at work and the next on its way."""
    large = sum(sizes.get(name, 0) for name in _LARGE)
    return sum(sizes.values()) * (1 + WORKSPACE) - large * 11 / 12


#: From the fastest to the smallest.
PLANS = (
    Plan("resident", "all of it on the device", lambda sizes: sum(sizes.values()) * (1 + WORKSPACE), _resident, True),
    Plan(
        "fp8-storage",
        "the transformer in 8 bits, slightly other pictures; the text encoder brought block by block",
        lambda sizes: _small(sizes) + sizes.get("transformer", 0) * FP8_SHARE,
        _fp8_storage,
    ),
    Plan("group-offload", "brought block by block, the slowest", _small, _group_offload),
)
NAMES = ("auto", *(plan.name for plan in PLANS))


def fits_resident(sizes: Mapping[str, int], free: int) -> bool:
    """Whether the weights fit as they are, with room to work."""
    return PLANS[0].required_bytes(sizes) <= free


def choose(name: str, sizes: Mapping[str, int], free: int, *, device: str = "cuda") -> Plan:
    """The plan of this name, or for "auto" the first that fits into `free` bytes. Raises OSError when none does.

    On a CPU there is nothing to bring weights from: they are mapped from their files, and what does not fit is read
    again when it is used.
    """
    if device == "cpu" and name == "auto":
        return PLANS[0]
    for plan in PLANS:
        if plan.name == name or (name == "auto" and plan.required_bytes(sizes) <= free):
            return plan
    least = min(plan.required_bytes(sizes) for plan in PLANS)
    raise OSError(
        f"the device has {free / 1e9:.1f} GB free, and the weights need {least / 1e9:.1f} GB at least; "
        "--memory NAME tries a plan all the same"
    )
