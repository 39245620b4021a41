"""The memory plans on this machine, for `flux-server doctor`: memory, time of a step, fidelity, and an advice."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.flux.flops import step_flops
from models.loading.memory_plans import PLANS, Plan, Target, allowed, choose
from server.settings import Settings

#: The tokens of an image of 1024x1024, and of FLUX.1's text.
_TOKENS, _TEXT_TOKENS = 4096, 512
_BY_NAME = {plan.name: plan for plan in PLANS}


def describe_plans(
    sizes: Mapping[str, int], config: Mapping[str, Any], target: Target, free: int
) -> Iterator[tuple[Plan, str]]:
    """Yield each plan with its line of the table, for full-size weights of these `sizes` in bytes.

    `config` is that of the transformer. On a GPU, two rates are measured first, which takes a second.
    """
    rates = _measured_rates() if target.device == "cuda" else None
    for plan in PLANS:
        needed = f"{plan.required_bytes(sizes) / 1e9:.1f} GB of GPU memory"
        if rates is None:
            yield plan, f"{needed}; seconds a step not yet measured, without a GPU; {_fidelity(plan, target)}"
        elif problem := plan.problem(target):
            yield plan, f"{needed}; not possible: {problem}"
        else:
            fits = "fits" if plan.required_bytes(sizes) <= free else "does not fit"
            yield plan, f"{needed}, {fits}; {_step(plan, sizes, config, *rates)}; {_fidelity(plan, target)}"


def _fidelity(plan: Plan, target: Target) -> str:
    """Describe how close images are to those of the exact weights."""
    if target.quantization and plan.quantize == "none":
        return f"the weights as their files have them, {target.quantization}"
    return plan.fidelity


def _measured_rates() -> tuple[float, float]:
    """Measure the GPU: floating point operations per second in bf16, and bytes per second from the host."""
    import torch

    from models.flux.device import Device

    device = Device("cuda")
    return device.matmul_rate(torch.bfloat16), device.copy_rate()


def _step(
    plan: Plan, sizes: Mapping[str, int], config: Mapping[str, Any], flops: float, bytes_per_second: float
) -> str:
    """Describe the least time of a step at 1024x1024: its operations, or its copies, by the measured rates."""
    seconds = step_flops(config, _TOKENS, _TEXT_TOKENS) / flops
    if plan.needs_fp8:
        return f"a step at 1024x1024 takes at least {seconds / 2:.2f} s, if fp8 is twice as fast as bf16"
    if plan.name == "group-offload":
        seconds = max(seconds, sizes["transformer"] / bytes_per_second)
    return f"a step at 1024x1024 takes at least {seconds:.2f} s"


def advice(sizes: Mapping[str, int], settings: Settings, target: Target, free: int) -> str:
    """Return what to do on this machine, in one sentence."""
    if target.device == "cpu":
        return "use a GPU; docs/weights-and-memory.md says which plan fits which card"
    plans = allowed(settings.memory, settings.quantize)
    try:
        chosen = choose(plans, sizes, free, target)
    except OSError:
        least = min(plans, key=lambda plan: plan.required_bytes(sizes))
        return f"free memory, because {least.name} needs {least.required_bytes(sizes) / 1e9:.1f} GB"
    for plan in plans[: plans.index(chosen)]:
        if plan.required_bytes(sizes) <= free and (problem := plan.problem(target)):
            return f"{plan.name} would change images less than {chosen.name}, but {problem}"
    fp8, int4 = _BY_NAME["fp8"], _BY_NAME["int4"]
    if chosen.name == "int8" and not fp8.problem(target) and fp8.required_bytes(sizes) <= free:
        return "keep int8 for the best images, or take --quantize fp8 for the fastest"
    if chosen.name == "group-offload" and not int4.problem(target):
        missing = (int4.required_bytes(sizes) - free) / 1e9
        return f"with {missing:.1f} GB more memory, int4 would not copy the weights in every step"
    return f"keep {chosen.name}"
