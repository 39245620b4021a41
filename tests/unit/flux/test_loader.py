"""The start of an engine when memory is short or the GPU cannot be used: doubles stand in for what only a GPU does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.base import EngineConfig
from models.flux.device import Device
from models.flux.loader import load_engine
from models.loading import devices, memory_plans, pipeline
from models.loading.specs import DEMO
from tests.support.tiny_flux import generate, make_request

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 72.00 MiB. GPU 0 has ...")


def config(**changes: Any) -> EngineConfig:
    return EngineConfig(DEMO, safety_checker="", device="cpu", **changes)


@pytest.fixture
def full_for(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let memory run out with the two faster plans; return how often each plan was tried."""
    tried: dict[str, int] = {}
    load = pipeline._load

    def fail(config: EngineConfig, directory: Path, sizes: Any, plan: memory_plans.Plan, device: str) -> Any:
        tried[plan.name] = tried.get(plan.name, 0) + 1
        if plan.name in ("resident", "fp8-storage"):
            raise FULL
        return load(config, directory, sizes, plan, device)

    monkeypatch.setattr(pipeline, "_load", fail)
    return tried


def test_when_memory_runs_out_the_next_plans_are_tried(
    full_for: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    engine = load_engine(config())
    assert full_for == {"resident": 1, "fp8-storage": 1, "group-offload": 1}
    assert engine.info().memory == "group-offload"
    assert "with the memory plan resident: CUDA out of memory; free memory" in caplog.text
    assert "trying the plan fp8-storage" in caplog.text and "trying the plan group-offload" in caplog.text
    assert generate(engine, make_request(width=64, height=64), 1)


def test_a_plan_that_the_operator_chose_is_the_only_one_tried(full_for: dict[str, int]) -> None:
    with pytest.raises(OSError, match=r"memory plan resident: CUDA out of memory.*--memory"):
        load_engine(config(memory="resident"))
    assert full_for == {"resident": 1}


def test_when_no_plan_is_left_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr(pipeline, "_load", fail)
    with pytest.raises(memory_plans.DoesNotFit, match="memory plan group-offload"):
        load_engine(config())


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake a CUDA build of PyTorch on a machine whose driver is too old."""

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nPlease update it")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)


@pytest.mark.usefixtures("old_driver")
def test_an_old_driver_is_named_with_its_version(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OSError, match=r"CUDA 13\.0, says: .*too old \(found version 12040\)\.; check the driver"):
        devices.device_for("cuda")
    assert devices.device_for("auto") == "cpu"
    load_engine(EngineConfig(DEMO, safety_checker=""))
    assert "no GPU is used: PyTorch" in caplog.text and "found version 12040" in caplog.text


def test_a_cpu_that_the_operator_chose_brings_no_word_about_gpus(
    old_driver: None, caplog: pytest.LogCaptureFixture
) -> None:
    load_engine(config())
    assert "no GPU" not in caplog.text


def test_a_build_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OSError, match="lacks CUDA; install a build with CUDA; or use --device cpu"):
        devices.device_for("cuda")


def test_waiting_for_a_step_keeps_no_core_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Event:
        def __init__(self, **settings: Any) -> None:
            made.append(settings)

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    device = Device("cuda")
    device.throttle()
    device.throttle()
    assert made == [{"blocking": True}] * 2
