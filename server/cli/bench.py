"""A comparison of the engine's tiers with diffusers' pipeline, as a table and as JSON: `flux-server bench`."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from models.base import EngineConfig
from models.benchmark import random_weights
from models.benchmark.compare import EngineBenchmark, Measurement, Workload
from models.loading import cpu, devices, memory_plans, specs
from models.loading.pipeline import load_pipeline
from server.settings import Settings

_HEADS = ("way", "size", "steps", "waiting", "s/image", "ms/step", "x naive", "share of matmul", "peak GB")


def run(
    settings: Settings,
    *,
    shape: str,
    sizes: Sequence[tuple[int, int]],
    num_steps: int,
    num_rounds: int,
    num_waiting: int,
    cap_gb: float,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure, and yield each text to print with the report so far. Raises OSError and ValueError for bad settings."""
    import torch

    device = devices.device_for(settings.device)
    if cap_gb and device == "cuda":
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(cap_gb * 1e9 / total)
    pipeline, plan = _pipeline(settings, shape, device)
    config = EngineConfig(
        None,
        "",
        device=device,
        memory=plan.name,
        max_acceleration=settings.max_acceleration,
        is_eager=settings.eager,
        compile_cache=settings.data_dir / "compiled",
    )
    bench = EngineBenchmark(pipeline, device, config, plan)
    report = _machine(device) | {
        "weights": f"random, {shape}" if shape else ", ".join(settings.weights),
        "dtype": devices.type_name(pipeline.transformer.dtype),
        "memory_plan": plan.name,
        "matmul_tflop_per_second": round(bench.rate / 1e12, 3),
        "figures": [],
    }
    yield "\n".join(f"{name}: {value}" for name, value in report.items() if name != "figures"), report
    smallest = min(sizes)
    difference = bench.difference(Workload(*smallest, num_steps))
    report["eager_difference"] = difference
    yield f"largest pixel difference of eager from naive (diffusers), {smallest[0]}x{smallest[1]}: {difference}", report
    yield "".join(f"{head:>16}" for head in _HEADS), report
    for size in sizes:
        for figure in bench.figures(Workload(*size, num_steps, num_waiting), num_rounds):
            report["figures"].append(dataclasses.asdict(figure))
            yield _line(figure), report


def _pipeline(settings: Settings, shape: str, device: str) -> tuple[Any, memory_plans.Plan]:
    import torch

    if not shape:
        (where,) = (specs.parse_spec(spec.rpartition("=")[2]) for spec in settings.weights[:1])
        return load_pipeline(EngineConfig(where, "", device=device, dtype=settings.dtype, memory=settings.memory))
    stored = random_weights.sizes(shape, torch.bfloat16)
    dtype = devices.dtype_for(settings.dtype, device, sum(stored.values()))
    free = devices.free_memory(device)
    sizes = random_weights.sizes(shape, dtype)
    plan = memory_plans.choose(settings.memory, sizes, free, device=device, is_eager=settings.eager)
    # For a plan that does not keep all weights on the device, build them in host memory, as loading does.
    pipeline = random_weights.build(shape, device if plan.is_resident else "cpu", dtype)
    return plan.apply(pipeline, device), plan


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


def _line(figure: Measurement) -> str:
    cells = (
        figure.way,
        figure.size,
        str(figure.num_steps),
        str(figure.num_waiting),
        f"{figure.seconds:.3f}",
        "" if figure.ms_per_step is None else f"{figure.ms_per_step:.1f}",
        f"{figure.ratio:.2f}",
        "" if figure.share is None else f"{figure.share:.2f}",
        "" if figure.peak_gb is None else f"{figure.peak_gb:.1f}",
    )
    return "".join(f"{cell:>16}" for cell in cells)


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the report as JSON."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
