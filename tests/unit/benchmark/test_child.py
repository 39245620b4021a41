"""Tests of the process that measures one plan: what it measures with and without compiled code."""

from pathlib import Path
from typing import Any

import pytest

from models.base import EngineConfig
from models.benchmark.child import measure
from models.benchmark.job import Job, Start, Workload
from models.flux import acceleration
from models.flux.acceleration import Tier
from models.flux.compilation import clone_sharing_weights
from models.loading import memory_plans


def job(tmp_path: Path, *, is_cold: bool) -> Job:
    config = EngineConfig(None, "", device="cpu", dtype="float32", compile_cache=tmp_path)
    workloads = [Workload(64, 64, num_steps=1), Workload(32, 96, num_steps=1)]
    return Job(config, "tiny", workloads, 1, ("a cat",), is_cold=is_cold)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Imitate compiled tiers, of which "high" fails; return the tiers that were warmed up."""
    warmed_up: list[str] = []

    def build(pipeline: Any, config: EngineConfig, device: str, way: str) -> tuple[list[Tier], list[str]]:
        clone = clone_sharing_weights(pipeline.transformer)
        return [Tier(name, clone, is_ready=False) for name in acceleration.NAMES], []

    def warm_up(tier: Tier, *sizes: Any) -> None:
        warmed_up.append(tier.name)
        if tier.name == "high":
            raise RuntimeError("no such kernel")
        tier.is_ready = True

    monkeypatch.setattr(acceleration, "build", build)
    monkeypatch.setattr(Tier, "warm_up", warm_up)
    return warmed_up


def test_only_the_start_is_measured_where_code_is_compiled_first(tmp_path: Path, compiled: list[str]) -> None:
    (start,) = measure(job(tmp_path, is_cold=True))
    assert isinstance(start, Start)
    assert start.is_compiled
    assert start.matmul_tflop_per_second is None
    assert start.unavailable == ("acceleration high: RuntimeError: no such kernel",)
    seconds = start.ready_seconds
    assert list(seconds) == ["naive", "eager", "none", "regular"]
    assert 0 < seconds["naive"] == seconds["eager"] < seconds["none"] < seconds["regular"]
    assert compiled == ["none", "regular", "high"]


def test_everything_is_measured_with_compiled_code(tmp_path: Path, compiled: list[str]) -> None:
    start, *figures = measure(job(tmp_path, is_cold=False))
    assert isinstance(start, Start)
    assert start.matmul_tflop_per_second
    ways = [(figure.way, figure.size) for figure in figures if not isinstance(figure, Start)]
    assert ways == [(way, size) for size in ("64x64", "32x96") for way in ("naive", "eager", "none", "regular")]


def test_memory_that_runs_out_during_the_start_names_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def run_out(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("models.flux.loader.warm_up_none", run_out)
    with pytest.raises(
        memory_plans.DoesNotFit, match=r"memory plan resident: .*: OutOfMemoryError: CUDA out of memory"
    ):
        list(measure(job(tmp_path, is_cold=True)))
