"""The memory plans: ways to place a pipeline so that it fits into the device's memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: The working memory of a generation, as a share of the bytes of all weights: 4 GB for FLUX.1 in bf16. The share is
#: calculated for 1024x1024 and not yet measured on the real model.
WORKSPACE = 0.12
#: The size of FLUX.1's transformer in 8 bits as a share of its size in bf16. The matrices of its norms, 27 % of the
#: transformer, stay in bf16.
FP8_SHARE = 0.64
#: The large components of a FLUX pipeline. All others stay on the device in every plan.
_LARGE = ("transformer", "text_encoder_2")


@dataclass(frozen=True)
class Plan:
    """A way to place a pipeline on the device.

    Attributes:
        name: the plan's name for --memory.
        description: a summary for `doctor`.
        required_bytes: returns the bytes needed on the device, given the bytes of each component's weights.
        apply: places a pipeline on a device and returns the pipeline.
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
    """Keep the transformer on the device in 8 bits, widening each layer while it runs; offload T5's blocks."""
    import torch

    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=pipeline.dtype)
    pipeline.transformer.to(device)
    _offload(pipeline.text_encoder_2.encoder, device)
    return _rest(pipeline, device)


def _group_offload(pipeline: Any, device: str) -> Any:
    """Keep the blocks of transformer and T5 in host memory; copy each to the device while the block before it runs."""
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
        # Pin a block only when it is copied: pinning all blocks would keep a second copy of them in host memory.
        low_cpu_mem_usage=True,
    )


def _rest(pipeline: Any, device: str) -> Any:
    pipeline.text_encoder.to(device)
    pipeline.vae.to(device)
    return pipeline


def _small(sizes: Mapping[str, int]) -> float:
    """Return the bytes of the small components, the working memory and two blocks of each large component.

    Two blocks, the one in use and the next, take a twelfth of T5's encoder, and less of the transformer.
    """
    large = sum(sizes.get(name, 0) for name in _LARGE)
    return sum(sizes.values()) * (1 + WORKSPACE) - large * 11 / 12


#: All plans, from the fastest to the one that needs least memory.
PLANS = (
    Plan("resident", "all weights on the device", lambda sizes: sum(sizes.values()) * (1 + WORKSPACE), _resident, True),
    Plan(
        "fp8-storage",
        "the transformer in 8 bits, which changes images slightly; the text encoder loaded block by block",
        lambda sizes: _small(sizes) + sizes.get("transformer", 0) * FP8_SHARE,
        _fp8_storage,
    ),
    Plan("group-offload", "transformer and text encoder loaded block by block; the slowest", _small, _group_offload),
)
NAMES = ("auto", *(plan.name for plan in PLANS))


class DoesNotFit(OSError):
    """Memory ran out while the weights were placed by a plan, although the plan seemed to fit."""

    def __init__(self, plan: Plan, reason: str) -> None:
        super().__init__(
            f"memory ran out while the weights were loaded with the memory plan {plan.name}: {reason}; "
            "free memory, or choose a plan that needs less with --memory"
        )
        self.plan = plan

    @property
    def next_plan(self) -> Plan | None:
        """The plan that needs less memory than this one; None if there is none."""
        following = PLANS[PLANS.index(self.plan) + 1 :]
        return following[0] if following else None


def fits_resident(sizes: Mapping[str, int], free: int) -> bool:
    """Return whether the plan "resident" fits into `free` bytes."""
    return PLANS[0].required_bytes(sizes) <= free


def choose(name: str, sizes: Mapping[str, int], free: int, *, device: str = "cuda") -> Plan:
    """Choose the plan of this name, or for "auto" the first plan that fits into `free` bytes.

    On a CPU, "auto" is always "resident": weights are mapped from their files, and parts that do not fit into memory
    are read again when they are used. Raises OSError if "auto" finds no plan that fits.
    """
    if device == "cpu" and name == "auto":
        return PLANS[0]
    for plan in PLANS:
        if plan.name == name or (name == "auto" and plan.required_bytes(sizes) <= free):
            return plan
    least = min(plan.required_bytes(sizes) for plan in PLANS)
    raise OSError(
        f"the device has {free / 1e9:.1f} GB free, but the weights need at least {least / 1e9:.1f} GB; "
        "free memory, or choose a plan with --memory to load them anyway"
    )
