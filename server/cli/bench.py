"""A comparison of memory plans and tiers with diffusers' pipeline, as a table and as JSON: `flux-server bench`."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models.base import EngineConfig, Weights
from models.benchmark.child import measure
from models.benchmark.fidelity import PROMPTS
from models.benchmark.job import Job, Measurement, Problem, Start, Workload
from models.benchmark.processes import ChildFailed, run_in_child
from models.loading import memory_plans, specs
from models.loading.pipeline import weights_directory
from server.cli.bench_table import heading, line
from server.settings import Settings

Report = dict[str, Any]
_PACKAGES = {"skimage": "scikit-image", "matplotlib": "matplotlib"}
_EXTRA = "is not installed; run pip install 'flux-server[bench]'"


@dataclass(frozen=True)
class Options:
    """The options of `flux-server bench` in addition to the settings.

    Attributes:
        shape: the shape of random weights; empty to measure the weights of the settings.
        plans: the memory plans to measure, one after the other; "auto" for the plan that the server would choose.
        workloads: the workloads to measure with each plan.
        num_rounds: the number of rounds whose medians are taken.
        cap_gb: the maximum GPU memory to use, in 10**9 bytes; 0 for no limit.
        prompts: the prompts of the compared images.
    """

    shape: str
    plans: Sequence[str]
    workloads: Sequence[Workload]
    num_rounds: int
    cap_gb: float
    prompts: Sequence[str]


def run(settings: Settings, options: Options) -> Iterator[tuple[str, Report]]:
    """Measure each plan, and yield each text to print with the report so far.

    Raises OSError if there is no place for temporary files, and ValueError for bad weights or if no plan was measured.
    """
    where = None if options.shape else specs.parse_spec(settings.weights[0].rpartition("=")[2], settings.base)
    report: Report = {
        "weights": f"random, {options.shape}" if options.shape else ", ".join(settings.weights),
        "prompts": list(options.prompts),
        "plans": [],
        "figures": [],
    }
    if where:
        # A download is no part of the time to ready.
        weights_directory(where)
    if where and not has_fidelity(options):
        yield f"PSNR and SSIM are not measured: scikit-image {_EXTRA}", report
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    # Not in /tmp, which containers often mount without permission to run the compiled code in it.
    with tempfile.TemporaryDirectory(prefix="bench-", dir=settings.data_dir) as directory:
        for name in _exact_first(options.plans):
            job = _job(settings, options, where, name, Path(directory))
            yield from _measure_plan(job, report)
    for plan in report["plans"]:
        for note in _notes(plan):
            yield note, report
    if not report["figures"]:
        raise ValueError("nothing was measured; the lines above say why")


def has_fidelity(options: Options) -> bool:
    """Return whether images are compared: random weights draw nothing, and the comparison needs scikit-image."""
    return not options.shape and find_spec("skimage") is not None


def require_extra(prompts: Path | None, plot: Path | None) -> None:
    """Check before anything is measured that the options --prompts and --plot can be followed.

    Raises OSError if a package of the extra `bench` is missing, and ValueError for a plot of an unknown kind.
    """
    for option, value, package in (("--prompts", prompts, "skimage"), ("--plot", plot, "matplotlib")):
        if value and find_spec(package) is None:
            raise OSError(f"{option}: {_PACKAGES[package]} {_EXTRA}")
    if plot and plot.suffix not in (".svg", ".png"):
        raise ValueError(f"--plot: {plot} does not end in .svg or .png")


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """Read prompts from a file, one in each line; without a file, return the built-in prompts.

    Raises OSError, and ValueError for a file without prompts or that is not UTF-8.
    """
    if path is None:
        return PROMPTS
    prompts = tuple(text.strip() for text in path.read_text(encoding="utf-8").splitlines() if text.strip())
    if not prompts:
        raise ValueError(f"--prompts: {path} has no prompt; write one in each line")
    return prompts


def _exact_first(plans: Sequence[str]) -> list[str]:
    """Return the plans, first those of the exact weights: the images of the others are compared with theirs."""
    exact = [plan.name for plan in memory_plans.PLANS if plan.quantize == "none"]
    return sorted(plans, key=lambda name: (name not in exact, name != "auto"))


def _job(settings: Settings, options: Options, where: Weights | None, plan: str, directory: Path) -> Job:
    config = EngineConfig(
        where,
        "",
        device=settings.device,
        dtype=settings.dtype,
        memory=plan,
        quantize=settings.quantize,
        max_acceleration=settings.max_acceleration,
        is_eager=settings.eager,
        compile_cache=directory / f"compiled-{plan}",
    )
    references = directory if has_fidelity(options) else None
    return Job(
        config, options.shape, options.workloads, options.num_rounds, options.prompts, references, options.cap_gb
    )


def _measure_plan(job: Job, report: Report) -> Iterator[tuple[str, Report]]:
    """Measure a plan, and add its results to the report; yield each text to print with the report."""
    plan: Report = {"memory_plan": job.config.memory, "unavailable": [], "problems": [], "failure": None}
    report["plans"].append(plan)
    starts: list[Start] = []
    with_fidelity = job.references is not None
    try:
        for result in _results(job):
            if isinstance(result, Start):
                starts.append(result)
                plan |= _facts(result)
                if "device" not in report:
                    report |= result.machine
                    yield "\n".join((*_machine(report, result), heading(with_fidelity=with_fidelity))), report
            elif isinstance(result, Problem):
                plan["problems"].append(dataclasses.asdict(result))
                yield f"{plan['memory_plan']} {result.way} {result.size} failed: {result.reason}", report
            else:
                report["figures"].append(_figure(result, starts))
                yield line(report["figures"][-1], with_fidelity=with_fidelity), report
    except ChildFailed as error:
        plan["failure"] = str(error)
        yield f"{plan['memory_plan']} failed: {error}", report


def _results(job: Job) -> Iterator[Start | Measurement | Problem]:
    """Measure a plan in a process that begins without compiled code; yield the results.

    If the engine compiles code, this process only starts the engine. A second one starts with the code and measures.
    """
    first = None
    for result in run_in_child(measure, job):
        first = first or result
        yield result
    if isinstance(first, Start) and first.is_compiled:
        yield from run_in_child(measure, dataclasses.replace(job, is_cold=False))


def _machine(report: Report, start: Start) -> Iterator[str]:
    return (f"{name}: {report[name]}" for name in ("weights", *start.machine))


def _figure(measurement: Measurement, starts: Sequence[Start]) -> Report:
    return {
        "memory_plan": starts[-1].memory_plan,
        **dataclasses.asdict(measurement),
        "ready_cold_seconds": starts[0].ready_seconds.get(measurement.way),
        "ready_warm_seconds": starts[-1].ready_seconds.get(measurement.way),
    }


def _facts(start: Start) -> Report:
    return {
        "memory_plan": start.memory_plan,
        "dtype": start.dtype,
        "matmul_tflop_per_second": start.matmul_tflop_per_second,
        "eager_difference": start.eager_difference,
        "unavailable": list(start.unavailable),
    }


def _notes(plan: Report) -> Iterator[str]:
    """Yield what the table does not show of a plan."""
    if plan.get("matmul_tflop_per_second") is not None:
        yield (
            f"{plan['memory_plan']}: matrix products in {plan['dtype']}: {plan['matmul_tflop_per_second']} TFLOP/s; "
            f"largest pixel difference of eager from naive: {plan['eager_difference']}"
        )
    for reason in plan["unavailable"]:
        yield f"{plan['memory_plan']}: {reason}"


def write(path: Path, report: Report) -> None:
    """Write the report as JSON."""
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
