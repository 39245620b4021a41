"""The memory plans: ways to place a pipeline so that it fits into the device's memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.loading import fp8

#: The memory in addition to the weights, as a share of all weights: 3.0 GB for FLUX.1 in bf16. Of it, a generation at
#: 1024x1024 takes 1.7 GB, simulated with PyTorch's fake tensors. The rest is for the CUDA context, the libraries'
#: workspaces and fragmentation. Not yet measured on a GPU.
RESERVE = 0.09
#: The size of FLUX.1's transformer in 8 bits as a share of its size in bf16. The matrices of its norms, 27 % of the
#: transformer, stay in bf16.
FP8_SHARE = 0.64
#: The large components of a FLUX pipeline, each with the share that its two largest blocks take: while one block
#: runs, the next is copied. All other components stay on the device in every plan.
_TWO_BLOCKS = {"transformer": 1 / 17, "text_encoder_2": 1 / 12}


@dataclass(frozen=True)
class Target:
    """What a plan must run on.

    Attributes:
        device: "cuda" or "cpu".
        is_eager: whether nothing may be compiled.
        fp8_failure: why products in fp8 do not compile on this device, as known from earlier; empty if they may.
    """

    device: str
    is_eager: bool = False
    fp8_failure: str = ""


@dataclass(frozen=True)
class Plan:
    """A way to place a pipeline on the device.

    Attributes:
        name: the plan's name for --memory.
        description: a summary for `doctor`.
        required_bytes: returns the bytes needed on the device, given the bytes of each component's weights.
        apply: places a pipeline on a device and returns the pipeline.
        is_resident: whether all weights stay on the device unchanged.
        needs_fp8: whether the device multiplies the transformer's matrices in fp8.
        rounds_weights: whether the weights are rounded to 8 bits, which changes images.
    """

    name: str
    description: str
    required_bytes: Callable[[Mapping[str, int]], float]
    apply: Callable[[Any, str], Any]
    is_resident: bool = False
    needs_fp8: bool = False
    rounds_weights: bool = False

    @property
    def can_compile(self) -> bool:
        """Whether the whole transformer stays on the device, in the form in which it computes."""
        return self.is_resident or self.needs_fp8

    def problem(self, target: Target) -> str | None:
        """Return the reason why the plan cannot be used; None if it can."""
        if not self.needs_fp8:
            return None
        if target.device == "cpu":
            return "on a CPU, products in fp8 are slow"
        if target.is_eager:
            return "products in fp8 are slow unless they are compiled"
        return target.fp8_failure or fp8.unavailable_reason()

    def place(self, pipeline: Any, device: str) -> Any:
        """Place a pipeline on a device and return it.

        Raises PlanFailed if its matrices cannot be quantized, torch.OutOfMemoryError, and the errors of a lost device.
        """
        import torch

        try:
            return self.apply(pipeline, device)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            if not self.needs_fp8:
                raise
            # Only the message: the traceback would keep the weights alive.
            reason = f"the matrices cannot be quantized: {type(error).__name__}: {error}"
        raise PlanFailed(self, reason)


def _resident(pipeline: Any, device: str) -> Any:
    return pipeline.to(device)


def _fp8(pipeline: Any, device: str) -> Any:
    """Quantize the transformer matrix by matrix on the device; offload T5's blocks."""
    fp8.quantize(pipeline.transformer, device)
    _offload(pipeline.text_encoder_2.encoder, device)
    return _rest(pipeline, device)


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


def _always(sizes: Mapping[str, int]) -> float:
    """Return the bytes that every plan needs: those of the small components, and the reserve."""
    # Only the plan "resident" loads LoRAs.
    sizes = {name: size for name, size in sizes.items() if not name.endswith("-lora")}
    return sum(size for name, size in sizes.items() if name not in _TWO_BLOCKS) + RESERVE * sum(sizes.values())


def _blocks(sizes: Mapping[str, int], name: str) -> float:
    """Return the bytes of two blocks of a large component."""
    return sizes.get(name, 0) * _TWO_BLOCKS[name]


def _in_fp8(sizes: Mapping[str, int]) -> float:
    """Return the bytes that a plan needs with the transformer in 8 bits and the text encoder loaded block by block."""
    return _always(sizes) + sizes.get("transformer", 0) * FP8_SHARE + _blocks(sizes, "text_encoder_2")


#: All plans, from the fastest to the one that needs least memory.
PLANS = (
    Plan("resident", "all weights on the device", lambda sizes: sum(sizes.values()) * (1 + RESERVE), _resident, True),
    Plan(
        "fp8",
        "the transformer in fp8 and compiled, which changes images slightly; the text encoder loaded block by block",
        _in_fp8,
        _fp8,
        needs_fp8=True,
        rounds_weights=True,
    ),
    Plan(
        "fp8-storage",
        "the transformer kept in 8 bits, which changes images slightly; the text encoder loaded block by block",
        _in_fp8,
        _fp8_storage,
        rounds_weights=True,
    ),
    Plan(
        "group-offload",
        "transformer and text encoder loaded block by block; the slowest",
        # The two large components do not run at the same time.
        lambda sizes: _always(sizes) + max(_blocks(sizes, name) for name in _TWO_BLOCKS),
        _group_offload,
    ),
)
NAMES = ("auto", *(plan.name for plan in PLANS))


class PlanFailed(OSError):
    """A memory plan did not work on this device, for this reason."""

    def __init__(self, plan: Plan, reason: str, advice: str = "choose another plan with --memory") -> None:
        super().__init__(f"memory plan {plan.name}: {reason}; {advice}")
        self.plan, self.reason = plan, reason


class DoesNotFit(PlanFailed):
    """Memory ran out while an engine was loaded with a memory plan."""

    def __init__(self, plan: Plan, reason: str) -> None:
        advice = "free memory, or choose a plan that needs less with --memory"
        super().__init__(plan, f"memory ran out while the weights were loaded: {reason}", advice)


def has_room(name: str, sizes: Mapping[str, int], free: int) -> bool:
    """Return whether the plan of this name fits into `free` bytes; for "auto", the plan "resident"."""
    plan = next((plan for plan in PLANS if plan.name == name), PLANS[0])
    return plan.required_bytes(sizes) <= free


def following(plan: Plan, target: Target) -> Plan | None:
    """Return the next plan after this one that can be used; None if there is none."""
    return next((other for other in PLANS[PLANS.index(plan) + 1 :] if not other.problem(target)), None)


def choose(name: str, sizes: Mapping[str, int], free: int, target: Target) -> Plan:
    """Choose the plan of this name, or for "auto" the first plan that fits into `free` bytes and can be used.

    On a CPU, "auto" is always "resident": weights are mapped from their files, and parts that do not fit into memory
    are read again when they are used. Raises OSError if "auto" finds no plan that fits, and PlanFailed if the named
    plan cannot be used.
    """
    if target.device == "cpu" and name == "auto":
        return PLANS[0]
    for plan in PLANS:
        if plan.name == name or (name == "auto" and plan.required_bytes(sizes) <= free):
            problem = plan.problem(target)
            if problem and name != "auto":
                raise PlanFailed(plan, problem)
            if not problem:
                return plan
    least = min(plan.required_bytes(sizes) for plan in PLANS)
    raise OSError(
        f"the device has {free / 1e9:.1f} GB free, but the weights need at least {least / 1e9:.1f} GB; "
        "free memory, or choose a plan with --memory to load them anyway"
    )
