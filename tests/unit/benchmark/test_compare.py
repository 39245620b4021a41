"""Tests of the comparison: skipped steps, fidelity, and ways that fail."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from models.base import GenerationFailed
from models.benchmark.compare import EngineBenchmark
from models.benchmark.job import Measurement, Problem, Workload
from models.flux import first_block_cache
from models.flux.device import Device
from tests.support import tiny_flux

PROMPTS = ("a red apple", "a blue star")
JOB = Workload(64, 96, num_steps=4, num_waiting=2)


@pytest.fixture(autouse=True)
def fixed_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the measurement of the matmul rate, which takes a second."""
    monkeypatch.setattr(Device, "matmul_rate", lambda device, dtype: 1e12)


def measured(bench: EngineBenchmark) -> dict[str, Measurement]:
    results = list(bench.figures(JOB, 1))
    figures = {result.way: result for result in results if isinstance(result, Measurement)}
    assert len(figures) == len(results)
    return figures


@pytest.mark.parametrize(("threshold", "share"), [(1e9, 3 / 4), (-1.0, 0.0)])
def test_high_tells_the_share_of_steps_that_skipped_blocks(
    monkeypatch: pytest.MonkeyPatch, threshold: float, share: float
) -> None:
    """The first step of an image has nothing to reuse."""
    monkeypatch.setattr(first_block_cache.FirstBlockCache, "__init__", cache_with(threshold))
    figures = measured(EngineBenchmark(tiny_flux.engine(), PROMPTS))
    assert {way: figure.skipped for way, figure in figures.items()} == {
        "naive": None,
        "eager": None,
        "regular": None,
        "high": share,
    }
    assert not any(figure.fidelity for figure in figures.values())


def cache_with(threshold: float) -> Any:
    """Return an __init__ of FirstBlockCache with another threshold."""
    original = first_block_cache.FirstBlockCache.__init__
    return lambda cache: original(cache, threshold)


def test_images_are_compared_with_those_of_the_first_plan(tmp_path: Path) -> None:
    engine = tiny_flux.engine()
    first = measured(EngineBenchmark(engine, PROMPTS, tmp_path))
    assert not first["naive"].fidelity
    assert [(image.prompt, image.is_equal) for image in first["eager"].fidelity] == [(each, True) for each in PROMPTS]
    with torch.no_grad():
        engine.pipeline.transformer.proj_out.weight.mul_(1.5)
    second = measured(EngineBenchmark(engine, PROMPTS, tmp_path))
    for image in second["eager"].fidelity:
        assert not image.is_equal
        assert image.psnr_db
        assert 0 < image.psnr_db < 60


def test_a_way_that_fails_is_named_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_flux.engine()
    advance = engine.advance

    def fail(task: Any, others: Sequence[Any] = ()) -> Any:
        if task.tier.name == "regular":
            raise GenerationFailed("Out of memory: an image did not fit.")
        return advance(task, others)

    monkeypatch.setattr(engine, "advance", fail)
    problem, *figures = EngineBenchmark(engine, PROMPTS).figures(JOB, 2)
    assert problem == Problem("regular", "64x96", "GenerationFailed: Out of memory: an image did not fit.")
    assert [figure.way for figure in figures] == ["naive", "eager", "high"]


def test_without_naive_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = EngineBenchmark(tiny_flux.engine(), PROMPTS)

    def fail(job: Workload) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bench, "_naive", fail)
    problem, *figures = bench.figures(dataclasses.replace(JOB, num_waiting=1), 1)
    assert problem == Problem("naive", "64x96", "OutOfMemoryError: CUDA out of memory.")
    assert {figure.ratio for figure in figures if isinstance(figure, Measurement)} == {None}
