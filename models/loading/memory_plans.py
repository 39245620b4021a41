"""The memory plans: ways to place a pipeline so that it fits into the device's memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.loading import fp8, placement, quantization

#: The memory in addition to the weights, as a share of all weights: 3.0 GB for FLUX.1 in bf16. Of it, a generation at
#: 1024x1024 takes 1.7 GB, simulated with PyTorch's fake tensors. The rest is for the CUDA context, the libraries'
#: workspaces and fragmentation. Not yet measured on a GPU.
RESERVE = 0.09
#: The size of FLUX.1's transformer and T5 in bf16: a little less than all weights, whose reserve thus does not change.
_EXACT_BYTES = 33e9
#: The size of FLUX.1's transformer in 8 bits as a share of its size in bf16. The matrices of its norms, 27 % of the
#: transformer, stay in bf16.
FP8_SHARE = 0.64
#: The reserves of the plans "int8" and "int4", a little smaller, so that they fit cards of 16 and 12 GB with a desktop.
#: If they are too small, images are decoded in tiles, which takes less memory.
_INT8_RESERVE, _INT4_RESERVE = 0.08, 0.07
#: The shares of the transformer and of T5 that are linear layers of blocks. The rest stays in bf16.
_LINEAR = {"transformer": 0.994, "text_encoder_2": 0.972}
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
        quantization: how the transformer's weights are quantized in their files; empty if they are not.
    """

    device: str
    is_eager: bool = False
    fp8_failure: str = ""
    quantization: str = ""


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
        quantize: the value of --quantize that allows the plan: the form to which weights are rounded, which changes
            images, or "none".
        fidelity: how close images are to those of the exact weights: the median of 100 images of the demo weights,
            or of 12 for fp8.
    """

    name: str
    description: str
    required_bytes: Callable[[Mapping[str, int]], float]
    apply: Callable[[Any, str], Any]
    is_resident: bool = False
    needs_fp8: bool = False
    quantize: str = "none"
    fidelity: str = "the exact weights"

    @property
    def can_compile(self) -> bool:
        """Whether the whole transformer stays on the device, in a form whose blocks compile."""
        return self.is_resident or self.needs_fp8 or self.quantize in quantization.BYTES

    def problem(self, target: Target) -> str | None:
        """Return the reason why the plan cannot be used; None if it can."""
        if target.quantization and self.quantize != "none":
            return f"the weights are quantized already ({target.quantization})"
        if target.quantization.startswith("quanto") and not self.is_resident:
            # On a CPU, an image did not finish within minutes.
            return "the weights of quanto cannot be copied block by block"
        if self.quantize in quantization.BYTES:
            return quantization.unavailable_reason()
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
            if self.quantize == "none":
                raise
            # Only the message: the traceback would keep the weights alive.
            reason = f"the matrices cannot be quantized: {type(error).__name__}: {error}"
        raise PlanFailed(self, reason)


def reserve(sizes: Mapping[str, int], share: float = RESERVE) -> float:
    """Return the bytes in addition to the weights.

    A generation takes as much with weights that are quantized in their files, whose sizes are smaller. Models smaller
    than FLUX.1 take less, at most as much as their transformer.
    """
    return max(share * sum(sizes.values()), min(share * _EXACT_BYTES, sizes.get("transformer", 0)))


def _always(sizes: Mapping[str, int], share: float = RESERVE) -> float:
    """Return the bytes that every plan needs: those of the small components, and the reserve."""
    return sum(size for name, size in sizes.items() if name not in _TWO_BLOCKS) + reserve(sizes, share)


def _blocks(sizes: Mapping[str, int], name: str) -> float:
    """Return the bytes of two blocks of a large component."""
    return sizes.get(name, 0) * _TWO_BLOCKS[name]


def _in_fp8(sizes: Mapping[str, int]) -> float:
    """Return the bytes that a plan needs with the transformer in 8 bits and the text encoder loaded block by block."""
    return _always(sizes) + sizes.get("transformer", 0) * FP8_SHARE + _blocks(sizes, "text_encoder_2")


def _quantized(sizes: Mapping[str, int], name: str, kind: str) -> float:
    """Return the bytes of a large component whose blocks are quantized. Their exact numbers take two bytes each."""
    return sizes.get(name, 0) * (1 - _LINEAR[name] + _LINEAR[name] * quantization.BYTES[kind] / 2)


def _in_int8(sizes: Mapping[str, int]) -> float:
    return _always(sizes, _INT8_RESERVE) + _quantized(sizes, "transformer", "int8") + _blocks(sizes, "text_encoder_2")


def _in_int4(sizes: Mapping[str, int]) -> float:
    return _always(sizes, _INT4_RESERVE) + sum(_quantized(sizes, name, "int4") for name in _LINEAR)


#: All plans, in the order in which "auto" tries them: from the one that changes images least to the one that changes
#: them most, and last the slowest.
PLANS = (
    Plan(
        "resident",
        "all weights on the device",
        lambda sizes: sum(sizes.values()) + reserve(sizes),
        placement.resident,
        is_resident=True,
    ),
    Plan(
        "int8",
        "the transformer in 8 bits, which changes images very slightly; the text encoder loaded block by block",
        _in_int8,
        placement.in_int8,
        quantize="int8",
        fidelity="PSNR 53 dB with the demo weights",
    ),
    Plan(
        "fp8",
        "the transformer in fp8 and compiled, which changes images slightly; the text encoder loaded block by block",
        _in_fp8,
        placement.in_fp8,
        needs_fp8=True,
        quantize="fp8",
        fidelity="PSNR 44 dB with the demo weights",
    ),
    Plan(
        "fp8-storage",
        "the transformer kept in 8 bits, which changes images slightly; the text encoder loaded block by block",
        _in_fp8,
        placement.fp8_storage,
        quantize="fp8",
        fidelity="PSNR 42 dB with the demo weights",
    ),
    Plan(
        "int4",
        "transformer and text encoder in 4 bits, which changes images visibly",
        _in_int4,
        placement.in_int4,
        quantize="int4",
        fidelity="PSNR 32 dB with the demo weights",
    ),
    Plan(
        "group-offload",
        "transformer and text encoder loaded block by block; the slowest",
        # The two large components do not run at the same time.
        lambda sizes: _always(sizes) + max(_blocks(sizes, name) for name in _TWO_BLOCKS),
        placement.group_offload,
    ),
)
NAMES = ("auto", *(plan.name for plan in PLANS))
#: The values of --quantize.
FORMS = ("auto", "none", "fp8", "int8", "int4")


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


def allowed(memory: str, quantize: str) -> tuple[Plan, ...]:
    """Return the plans that --memory and --quantize allow, the first of them first. Raises ValueError if none."""
    plans = tuple(plan for plan in PLANS if memory in ("auto", plan.name) and quantize in ("auto", plan.quantize))
    if not plans:
        raise ValueError(f"--memory {memory} cannot be used with --quantize {quantize}")
    return plans


def has_room(plans: Sequence[Plan], sizes: Mapping[str, int], free: int) -> bool:
    """Return whether the first of these plans fits into `free` bytes."""
    return plans[0].required_bytes(sizes) <= free


def following(plan: Plan, plans: Sequence[Plan], target: Target) -> Plan | None:
    """Return the next of these plans after this one that can be used; None if there is none."""
    return next((other for other in plans[plans.index(plan) + 1 :] if not other.problem(target)), None)


def choose(plans: Sequence[Plan], sizes: Mapping[str, int], free: int, target: Target) -> Plan:
    """Choose the first of these plans that fits into `free` bytes and can be used; a single plan need not fit.

    On a CPU, the first that can be used is chosen: weights are mapped from their files, and parts that do not fit into
    memory are read again when they are used. Raises OSError if no plan fits, and PlanFailed if a single plan cannot be
    used.
    """
    if len(plans) == 1 and (problem := plans[0].problem(target)):
        raise PlanFailed(plans[0], problem)
    needs_room = target.device != "cpu" and len(plans) > 1
    usable = [plan for plan in plans if not plan.problem(target)]
    for plan in usable:
        if not needs_room or plan.required_bytes(sizes) <= free:
            return plan
    least = min(plan.required_bytes(sizes) for plan in usable or plans)
    raise OSError(
        f"the device has {free / 1e9:.1f} GB free, but the weights need at least {least / 1e9:.1f} GB; "
        "free memory, or choose a plan with --memory to load them anyway"
    )
