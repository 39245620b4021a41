"""Tests of `flux-server bench`: the whole command on tiny, untrained weights, and how the results of plans join."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.benchmark.fidelity import PROMPTS
from models.benchmark.job import ImageFidelity, Job, Measurement, Problem, Start, Workload
from models.benchmark.processes import ChildFailed
from models.loading.memory_plans import PLANS, Target
from server.cli import bench
from server.settings import Settings
from tests.support.server_process import ROOT

#: The plans that a CPU can use, in the order in which they are measured: first those of the exact weights.
NAMES = [
    plan.name for plan in sorted(PLANS, key=lambda plan: plan.quantize != "none") if not plan.problem(Target("cpu"))
]
EQUAL = ImageFidelity("a cat", is_equal=True, psnr_db=None, ssim=1.0)
MEASURED = Measurement("none", "64x64", 28, 1, 2.5, 80.0, 1.2, 0.4, None, 33.0)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("plans", "names"), [("fp8,resident", NAMES[:1]), pytest.param("all", NAMES, marks=pytest.mark.thorough)]
)
def test_every_plan_and_way_is_measured_alongside_the_pipeline(tmp_path: Path, plans: str, names: list[str]) -> None:
    """Run the command over these plans, each of which starts a process."""
    file, plot, sizes = tmp_path / "figures.json", tmp_path / "figures.svg", ("96x64", "64x64")
    options = ("--random-weights", "tiny", "--sizes", ",".join(sizes), "--steps", "2", "--rounds", "1")
    files = ("--data-dir", str(tmp_path / "data"), "--json", str(file), "--plot", str(plot))
    completed = run_command(*options, "--plans", plans, "--waiting", "2", "--device", "cpu", *files)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    report = json.loads(file.read_text())
    assert report["weights"] == "random, tiny"
    failed = [plan["failure"] for plan in report["plans"] if plan["memory_plan"] not in names]
    assert any("memory plan fp8: on a CPU" in failure for failure in failed)
    measured = [plan for plan in report["plans"] if plan["failure"] is None]
    assert [(plan["memory_plan"], plan["eager_difference"]) for plan in measured] == [(name, 0) for name in names]
    assert all(plan["matmul_tflop_per_second"] > 0 for plan in measured)
    ways = [(figure["memory_plan"], figure["way"], figure["size"]) for figure in report["figures"]]
    assert ways == [(name, way, size) for name in names for size in sizes for way in ("naive", "eager", "regular")]
    for figure in report["figures"]:
        assert figure["seconds"] > 0
        # Nothing compiles on a CPU, so one start is both.
        assert figure["ready_cold_seconds"] == figure["ready_warm_seconds"] > 0
        assert figure["fidelity"] == []
        # The steps take only part of the time, and reach only a share of the device's peak rate.
        assert 0 < figure["share"] < 1 and figure["ms_per_step"] > 0
        if figure["way"] != "naive":
            assert figure["ms_per_step"] / 1000 * figure["num_steps"] < figure["seconds"]
    rows = [tuple(line.split()[:3]) for line in completed.stdout.splitlines()]
    assert [row for row in rows if row in ways] == ways
    assert "PSNR" not in completed.stdout
    # Matplotlib draws text as shapes, and repeats it in comments.
    assert all(f"<!-- {text} -->" in plot.read_text() for text in (*names, *sizes, "naive", "eager", "regular"))
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--random-weights", "huge"), 2, "huge is not one of tiny, full"),
        (("--sizes", "big"), 2, "big is not WIDTHxHEIGHT"),
        (("--memory", "float3"), 2, "--memory"),
        (("--plans", "resident,float3"), 2, "float3 is not one of auto, resident"),
        (("nowhere/at/all",), 2, "nowhere/at/all"),
        (("--plot", "figures.txt"), 1, "figures.txt does not end in .svg or .png"),
        (("--prompts", "nowhere.txt"), 1, "nowhere.txt"),
    ],
)
def test_arguments_that_cannot_be_measured_are_rejected(arguments: tuple[str, ...], code: int, message: str) -> None:
    completed = run_command(*arguments)
    assert completed.returncode == code
    assert message in completed.stderr


def start(job: Job, cold: float, warm: float, *, is_compiled: bool = True) -> Start:
    seconds = {"naive": 1.0, "none": cold if job.is_cold else warm}
    rates = () if job.is_cold and is_compiled else (700.0, 0)
    return Start({"device": "H200"}, job.config.memory, "bfloat16", seconds, is_compiled, ("high: no kernel",), *rates)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that runs the benchmark with imitated processes: their texts and the report."""

    def run_with(children: dict[str, Any], shape: str = "") -> tuple[list[str], dict[str, Any]]:
        monkeypatch.setattr(bench, "run_in_child", lambda measure, job: children[job.config.memory](job))
        monkeypatch.setattr(bench, "find_spec", lambda package: object())
        options = bench.Options(shape, tuple(children), [Workload(64, 64, 28)], 3, 0, PROMPTS)
        results = list(bench.run(Settings(data_dir=tmp_path), options))
        texts = [line for text, _ in results for line in text.splitlines()]
        bench.write(tmp_path / "figures.json", results[-1][1])
        return texts, json.loads((tmp_path / "figures.json").read_text())

    return run_with


def resident(job: Job) -> Iterator[Any]:
    """Imitate a plan that compiles: the first process only starts."""
    yield start(job, 60.0, 9.5)
    if not job.is_cold:
        yield MEASURED
        yield Problem("regular", "64x64", "GenerationFailed: not finite")


def too_large(job: Job) -> Iterator[Any]:
    """Imitate a plan that does not fit."""
    yield from ()
    raise ChildFailed("memory ran out")


def offloaded(job: Job) -> Iterator[Any]:
    """Imitate a plan that compiles nothing, and dies while it measures."""
    yield start(job, 4.0, 4.0, is_compiled=False)
    yield MEASURED
    raise ChildFailed("the process ended by signal 6")


def test_the_plans_join_and_a_failed_plan_is_named(run: Any) -> None:
    texts, report = run({"fp8-storage": too_large, "resident": resident, "group-offload": offloaded}, "full")
    failures = {plan["memory_plan"]: plan["failure"] for plan in report["plans"]}
    assert failures == {
        "fp8-storage": "memory ran out",
        "resident": None,
        "group-offload": "the process ended by signal 6",
    }
    assert list(failures) == ["resident", "group-offload", "fp8-storage"], "the exact weights draw the references"
    assert [
        (figure["memory_plan"], figure["ready_cold_seconds"], figure["ready_warm_seconds"])
        for figure in report["figures"]
    ] == [("resident", 60.0, 9.5), ("group-offload", 4.0, 4.0)]
    assert report["plans"][0]["problems"] == [
        {"way": "regular", "size": "64x64", "reason": "GenerationFailed: not finite"}
    ]
    assert report["device"] == "H200"
    rows = [text.split() for text in texts]
    for row in (
        "fp8-storage failed: memory ran out",
        "resident none 64x64 28 1 2.500 80.0 1.20 0.40 33.0 60.0 9.5",
        "resident regular 64x64 failed: GenerationFailed: not finite",
        "group-offload none 64x64 28 1 2.500 80.0 1.20 0.40 33.0 4.0 4.0",
        "group-offload failed: the process ended by signal 6",
        "resident: high: no kernel",
    ):
        assert rows.count(row.split()) == 1
    assert sum(row[:2] == ["plan", "way"] for row in rows) == 1


def test_without_any_figure_the_command_fails(run: Any) -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        run({"resident": too_large})


@pytest.mark.parametrize(
    ("fidelity", "cells"),
    [
        ((EQUAL, EQUAL), ["equal", "1.0000"]),
        ((EQUAL, ImageFidelity("a dog", is_equal=False, psnr_db=31.25, ssim=0.9712)), ["31.2", "0.9712"]),
        ((), []),
    ],
)
def test_equal_images_have_a_word_in_the_table_and_null_in_json(run: Any, fidelity: Any, cells: list[str]) -> None:
    measurement = Measurement("high", "64x64", 28, 1, 1.5, 40.0, 2.0, 0.8, 13 / 28, 41.0, fidelity)

    def child(job: Job) -> Iterator[Any]:
        yield start(job, 4.0, 4.0, is_compiled=False)
        yield measurement

    texts, report = run({"resident": child})
    (heading,) = (text for text in texts if text.split()[:2] == ["plan", "way"])
    (row,) = (text.split() for text in texts if text.split()[:2] == ["resident", "high"])
    assert heading.split()[-3:] == ["PSNR", "dB", "SSIM"]
    # There are no seconds to ready, because the imitated start has none for "high".
    assert row[8:] == ["0.80", "46%", "41.0", *cells]
    assert [image["psnr_db"] for image in report["figures"][0]["fidelity"]] == [each.psnr_db for each in fidelity]


def test_missing_packages_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda package: None)
    with pytest.raises(OSError, match=r"--prompts: scikit-image is not installed; run pip install 'flux-server\[ben"):
        bench.require_extra(tmp_path, None)
    with pytest.raises(OSError, match="--plot: matplotlib is not installed"):
        bench.require_extra(None, tmp_path / "plot.svg")
    bench.require_extra(None, None)


def test_without_scikit_image_the_rest_is_measured(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = bench.Options("", ("resident",), [Workload(64, 64, 28)], 3, 0, PROMPTS)
    monkeypatch.setattr(bench, "run_in_child", lambda measure, job: resident(job) if not job.references else None)
    monkeypatch.setattr(bench, "find_spec", lambda package: None)
    texts = [text for text, _ in bench.run(Settings(data_dir=tmp_path), options)]
    assert texts[0].startswith("PSNR and SSIM are not measured: scikit-image is not installed; run pip install")
    assert any(text.split()[:2] == ["resident", "none"] for text in texts)


def test_prompts_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog, café \n", encoding="utf-8")
    assert bench.read_prompts(path) == ("a cat", "a dog, café")
    assert bench.read_prompts(None) == PROMPTS
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no prompt"):
        bench.read_prompts(path)
