"""The work of one process of the benchmark: start an engine with one memory plan, then measure it."""

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from models.base import EngineConfig, GenerationFailed
from models.benchmark.job import Job, Measurement, Problem, Start
from models.loading import cpu, devices, memory_plans

if TYPE_CHECKING:
    from models.flux.engine import FluxEngine


def measure(job: Job) -> Iterator[Start | Measurement | Problem]:
    """Yield the start of the engine, then the measurement or the problem of each way in each workload.

    If the process is to compile code for the first time, yield only the start: compiling also slows what follows.

    Raises the errors of loading: OSError, ValueError and RuntimeError; and DeviceLost.
    """
    import torch

    from models.benchmark.compare import FAILURES, EngineBenchmark
    from models.flux.device import summary

    # With these variables, compiled code would come from earlier runs.
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ.pop(name, None)
    device = devices.device_for(job.config.device)
    if job.cap_gb and device == "cuda":
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.cap_gb * 1e9 / total))
    engine, ready_seconds = start(job.config, job.shape, device)
    dtype = devices.type_name(engine.pipeline.transformer.dtype)
    is_compiled = any(tier.transformer is not engine.pipeline.transformer for tier in engine.tiers)
    facts = (_machine(device), engine.plan.name, dtype, ready_seconds, is_compiled, tuple(engine.unavailable))
    if job.is_cold and is_compiled:
        yield Start(*facts)
        return
    bench = EngineBenchmark(engine, job.prompts, job.references)
    smallest = min(job.workloads, key=lambda workload: workload.width * workload.height)
    difference, problem = None, None
    try:
        difference = bench.difference(smallest)
    except FAILURES as error:
        problem = Problem("eager", smallest.size, f"no comparison with naive: {summary(error)}")
    yield Start(*facts, round(bench.rate / 1e12, 3), difference)
    if problem:
        yield problem
    for workload in job.workloads:
        yield from bench.figures(workload, job.num_rounds)


def start(config: EngineConfig, shape: str, device: str) -> "tuple[FluxEngine, dict[str, float]]":
    """Start an engine as the server does, but without the self test and the safety checker.

    Return the engine, and for each way to generate the seconds from the start of loading until it could generate.
    Raises OSError and ValueError if the weights cannot be loaded, and DeviceLost.
    """
    import torch

    from models.flux import loader, safety_checker
    from models.flux.acceleration import Tier
    from models.flux.device import Device, summary
    from models.flux.engine import FluxEngine

    now = Device(device).now
    started = now()
    pipeline, plan = _load(config, shape, device)
    ready = dict.fromkeys(("naive", "eager"), now() - started)
    none = [Tier("none", pipeline.transformer)]
    engine = FluxEngine(pipeline, safety_checker.Unavailable("not used"), none, device, plan=plan)
    try:
        loader.warm_up_none(engine, config, {})
    except torch.OutOfMemoryError as error:
        raise memory_plans.DoesNotFit(plan, summary(error)) from None
    is_warm = False
    while not is_warm:
        ready |= {tier.name: now() - started for tier in engine.tiers if tier.is_ready and tier.name not in ready}
        # As in the server, a tier that fails is left out; `unavailable` has the reason.
        with suppress(OSError, ValueError, RuntimeError, GenerationFailed):
            is_warm = not engine.warm_up()
    return engine, ready


def _load(config: EngineConfig, shape: str, device: str) -> tuple[Any, memory_plans.Plan]:
    import torch

    from models.benchmark import random_weights
    from models.flux.device import summary
    from models.loading.pipeline import load_pipeline

    if not shape:
        return load_pipeline(config)
    stored = random_weights.sizes(shape, torch.bfloat16)
    dtype = devices.dtype_for(config.dtype, device, sum(stored.values()))
    free = devices.free_memory(device)
    sizes = random_weights.sizes(shape, dtype)
    plans = memory_plans.allowed(config.memory, config.quantize)
    plan = memory_plans.choose(plans, sizes, free, memory_plans.Target(device, config.is_eager))
    try:
        # For a plan that does not keep all weights on the device, build them in host memory, as loading does.
        pipeline = random_weights.build(shape, device if plan.is_resident else "cpu", dtype)
        return plan.place(pipeline, device), plan
    except torch.OutOfMemoryError as error:
        raise memory_plans.DoesNotFit(plan, summary(error)) from None


def _machine(device: str) -> dict[str, Any]:
    import diffusers
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else cpu.describe()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "load_average": round(os.getloadavg()[0], 2),
    }
