"""Tests of loading an engine when memory is short or the GPU cannot be used; doubles replace what needs a GPU."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.base import DeviceLost, EngineConfig
from models.flux import acceleration, loader
from models.flux.acceleration import COMPILED, FASTEST, UNCOMPILED, Tier
from models.flux.attempts import Attempts, forget_open_attempts
from models.flux.device import Device
from models.flux.loader import load_engine
from models.loading import devices, fp8, memory_plans, pipeline, quantization
from models.loading.specs import DEMO
from tests.support.server_process import ROOT
from tests.support.tiny_flux import generate, make_request

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 72.00 MiB. GPU 0 has ...")


def config(**changes: Any) -> EngineConfig:
    return EngineConfig(DEMO, safety_checker="", device="cpu", **changes)


@pytest.fixture
def full_for(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let memory run out with the two faster plans; return a dict that counts the tries of each plan."""
    tried: dict[str, int] = {}
    load = pipeline._load

    def fail(config: EngineConfig, directory: Path, sizes: Any, plan: memory_plans.Plan, *more: Any) -> Any:
        tried[plan.name] = tried.get(plan.name, 0) + 1
        if plan.name in ("resident", "fp8-storage"):
            raise FULL
        return load(config, directory, sizes, plan, *more)

    monkeypatch.setattr(pipeline, "_load", fail)
    return tried


@pytest.fixture(autouse=True)
def no_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plans for which torchao quantizes the weights, whether it is installed or not."""
    monkeypatch.setattr(quantization, "unavailable_reason", lambda: "torchao is not installed")


def test_when_memory_runs_out_the_next_plans_are_tried(
    full_for: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    engine = load_engine(config())
    assert full_for == {"resident": 1, "fp8-storage": 1, "group-offload": 1}
    assert engine.info().memory == "group-offload"
    assert (
        "memory plan resident: memory ran out while the weights were loaded: CUDA out of memory; free memory"
        in caplog.text
    )
    assert "trying the plan fp8-storage" in caplog.text and "trying the plan group-offload" in caplog.text
    reasons = [f"memory plan {name}: memory ran out" for name in ("resident", "fp8-storage")]
    assert [reason.partition(" while")[0] for reason in engine.info().unavailable] == reasons
    assert generate(engine, make_request(width=64, height=64), 1)


def test_a_plan_that_the_operator_chose_is_the_only_one_tried(full_for: dict[str, int]) -> None:
    with pytest.raises(OSError, match=r"memory plan resident: .*CUDA out of memory.*--memory"):
        load_engine(config(memory="resident"))
    assert full_for == {"resident": 1}


def test_when_no_plan_is_left_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr(pipeline, "_load", fail)
    with pytest.raises(memory_plans.DoesNotFit, match="memory plan group-offload"):
        load_engine(config())


def test_a_load_that_fails_frees_the_memory_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other engines need the memory, which PyTorch would otherwise keep."""
    parts: list[Any] = []
    freed: list[bool] = []

    def fail(*_: Any) -> None:
        part = torch.nn.Linear(4, 4)
        parts.append(weakref.ref(part))
        raise OSError("a file is damaged")

    monkeypatch.setattr(pipeline, "_load", fail)
    monkeypatch.setattr(Device, "free", lambda _: freed.append(parts[0]() is None))
    with pytest.raises(OSError, match="a file is damaged"):
        load_engine(config())
    assert freed == [True]


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
    with pytest.raises(OSError, match=r"CUDA 13\.0, says: .*too old \(found version 12040\); check the driver"):
        devices.device_for("cuda")
    assert devices.device_for("auto") == "cpu"
    load_engine(EngineConfig(DEMO, safety_checker=""))
    assert "no GPU is used: PyTorch" in caplog.text and "found version 12040" in caplog.text


def test_nothing_is_said_about_gpus_if_the_operator_chose_the_cpu(
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


# -- the ways to run the tiers, from the fastest to the one that always works


WAYS = [FASTEST, COMPILED, UNCOMPILED]


class Gpu:
    """Double of a GPU that can compile: `tried` lists the ways tried, and `errors` has the errors of their tiers."""

    def __init__(self) -> None:
        self.errors: dict[str, BaseException] = {}
        self.tried: list[str] = []

    def build(
        self, pipeline: Any, config: EngineConfig, plan: memory_plans.Plan, way: str
    ) -> tuple[list[Tier], list[str]]:
        self.tried.append(way)
        if way == UNCOMPILED:
            return [Tier("none", pipeline.transformer)], []
        tiers = [self.tier(name, pipeline.transformer, self.errors.get(way)) for name in ("none", "regular")]
        return tiers, ["acceleration high: a reason"]

    def tier(self, name: str, transformer: Any, error: BaseException | None) -> Tier:
        def run(**arguments: Any) -> Any:
            if error:
                # Raise a new error each time, because an error keeps the frames that it passed through.
                raise type(error)(*error.args)
            return transformer(**arguments)

        run.config = transformer.config  # type: ignore[attr-defined]
        return Tier(name, run, is_ready=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    double = Gpu()

    def ways(config: EngineConfig, device: str, plan: memory_plans.Plan) -> list[str]:
        return WAYS[:2] if plan.needs_fp8 else WAYS if plan.is_resident else [UNCOMPILED]

    monkeypatch.setattr(acceleration, "ways", ways)
    monkeypatch.setattr(acceleration, "build", double.build)
    # With the numbers of tokens of a GPU's warm-up, each forward would take seconds on a CPU.
    monkeypatch.setattr(acceleration, "_WARM_TOKENS", (16, 20))
    monkeypatch.setattr("models.flux.loader.Attempts", lambda _: Attempts(tmp_path))
    return double


def test_the_fastest_way_that_works_is_used(gpu: Gpu) -> None:
    engine = load_engine(config())
    assert gpu.tried == [FASTEST]
    assert engine.info().way == FASTEST
    assert engine.info().acceleration == ("none",)
    assert engine.warm_up()
    assert engine.info().acceleration == ("none", "regular")
    assert engine.info().unavailable == ("acceleration high: a reason",)


@pytest.mark.parametrize("num_broken", [1, 2])
def test_a_way_that_fails_leads_to_the_next_and_info_has_the_cause(
    gpu: Gpu, num_broken: int, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.errors = dict.fromkeys([FASTEST, COMPILED][:num_broken], ValueError("CantSplit\nand more"))
    engine = load_engine(config())
    assert gpu.tried == [FASTEST, COMPILED, UNCOMPILED][: num_broken + 1]
    assert engine.info().way.startswith(gpu.tried[-1])
    expected = [f"{way}: ValueError: CantSplit" for way in [FASTEST, COMPILED][:num_broken]]
    assert list(engine.info().unavailable)[:num_broken] == expected
    assert f"the weights do not run {FASTEST}" in caplog.text and "and more" in caplog.text
    assert engine.info().acceleration == ("none",)
    assert generate(engine, make_request(width=64, height=64, acceleration="high"), 1)


def test_memory_that_runs_out_in_the_warm_up_leads_to_the_next_plan(gpu: Gpu) -> None:
    gpu.errors = {FASTEST: FULL}
    with pytest.raises(
        memory_plans.DoesNotFit, match=r"memory plan resident: .*: OutOfMemoryError: CUDA out of memory"
    ):
        load_engine(config(memory="resident"))
    assert gpu.tried == [FASTEST]
    gpu.tried.clear()
    engine = load_engine(config())
    assert engine.info().memory == "fp8-storage"
    assert gpu.tried == [FASTEST, UNCOMPILED]


def test_the_weights_of_a_plan_that_did_not_fit_are_freed_before_the_next(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.errors = {FASTEST: FULL}
    loaded: list[Any] = []
    load_pipeline = pipeline.load_pipeline

    def load(given: EngineConfig, fp8_failure: str) -> Any:
        gc.collect()
        assert all(reference() is None for reference in loaded)
        found, plan = load_pipeline(given, fp8_failure)
        loaded.append(weakref.ref(found.transformer))
        return found, plan

    monkeypatch.setattr("models.flux.loader.load_pipeline", load)
    load_engine(config())
    assert len(loaded) == 2


def test_a_way_that_loses_the_gpu_ends_the_process_and_is_not_tried_again(gpu: Gpu) -> None:
    gpu.errors = {FASTEST: torch.AcceleratorError("an illegal memory access was encountered")}
    with pytest.raises(DeviceLost, match="illegal memory access"):
        load_engine(config())
    engine = load_engine(config())
    assert gpu.tried == [FASTEST, COMPILED]
    assert engine.info().unavailable[0] == f"{FASTEST}: ended the server or lost the GPU at earlier starts"


def test_a_tier_that_loses_the_gpu_is_not_offered_again(gpu: Gpu) -> None:
    engine = load_engine(config())
    engine.tiers[1] = gpu.tier("regular", engine.pipeline.transformer, torch.AcceleratorError("an error"))
    with pytest.raises(DeviceLost):
        engine.warm_up()
    engine = load_engine(config())
    assert not engine.warm_up()
    assert "acceleration regular: ended the server or lost the GPU at earlier starts" in engine.info().unavailable


@pytest.mark.parametrize(
    ("failed", "tried", "unavailable"),
    [
        ({f"blocks {FASTEST}": "too slow"}, [COMPILED], f"{FASTEST}: failed in the self test: too slow"),
        (
            {"blocks compiled in fp8": "wrong"},
            [FASTEST],
            "acceleration regular: failed in the self test: wrong",
        ),
    ],
)
def test_what_failed_in_the_self_test_is_not_tried(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, failed: dict[str, str], tried: list[str], unavailable: str
) -> None:
    monkeypatch.setattr("models.flux.loader.verdict.failures", lambda _: failed)
    engine = load_engine(config())
    assert gpu.tried == tried
    assert unavailable in engine.info().unavailable
    assert engine.warm_up() == ("regular" not in unavailable)


@pytest.fixture
def fp8_plan(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> memory_plans.Plan:
    """Let "auto" choose the plan "fp8", and leave out what only a GPU can do."""
    plan = next(plan for plan in memory_plans.PLANS if plan.needs_fp8)
    monkeypatch.setattr(memory_plans.Plan, "problem", lambda plan, target: target.fp8_failure if plan.needs_fp8 else "")
    monkeypatch.setattr(fp8, "quantize", lambda *_: None)
    choose = memory_plans.choose

    def choose_as_on_a_card_of_24_gb(
        plans: Sequence[memory_plans.Plan], sizes: Any, free: int, target: memory_plans.Target
    ) -> Any:
        card = replace(target, device="cuda")
        return choose(plans, sizes, int(plan.required_bytes(sizes)) + 1, card)

    monkeypatch.setattr(memory_plans, "choose", choose_as_on_a_card_of_24_gb)
    return plan


def test_the_plan_fp8_is_compiled(gpu: Gpu, fp8_plan: memory_plans.Plan) -> None:
    engine = load_engine(config(quantize="fp8"))
    assert engine.plan is fp8_plan
    assert gpu.tried == [FASTEST]
    assert engine.warm_up() and engine.info().acceleration == ("none", "regular")


@pytest.mark.parametrize("is_found_by_the_self_test", [False, True])
def test_without_compilation_in_fp8_the_next_plan_is_used(
    gpu: Gpu, fp8_plan: memory_plans.Plan, monkeypatch: pytest.MonkeyPatch, is_found_by_the_self_test: bool
) -> None:
    if is_found_by_the_self_test:
        monkeypatch.setattr("models.flux.loader.verdict.failures", lambda _: {"blocks compiled in fp8": "CantSplit"})
    else:
        gpu.errors = dict.fromkeys([FASTEST, COMPILED], ValueError("CantSplit"))
    engine = load_engine(config(quantize="fp8"))
    assert engine.info().memory == "fp8-storage"
    (reason,) = engine.info().unavailable
    cause = "failed in the self test" if is_found_by_the_self_test else f"{FASTEST} in fp8: ValueError"
    assert reason.startswith(f"memory plan fp8: {cause}: CantSplit")
    assert gpu.tried == ([] if is_found_by_the_self_test else [FASTEST, COMPILED]) + [UNCOMPILED]
    assert generate(engine, make_request(width=64, height=64, acceleration="regular"), 1)


DIES = """
import os, sys
from dataclasses import replace
from pathlib import Path
from models.flux.attempts import Attempts
with Attempts(Path(sys.argv[1])).attempt("a way"):
    os.kill(os.getpid(), 9)
"""


def test_after_two_deaths_of_the_process_an_attempt_is_refused(tmp_path: Path) -> None:
    """One death is not enough, because an operator may have killed a slow start."""
    attempts = Attempts(tmp_path)
    for is_refused in (False, True):
        assert not attempts.is_refused("a way")
        subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], cwd=ROOT, check=False, timeout=300)
        assert attempts.is_refused("a way") == is_refused
    assert not attempts.is_refused("another way")


def test_an_attempt_that_ends_leaves_nothing(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for _ in range(3):
        with attempts.attempt("a way"):
            pass
        with pytest.raises(ValueError, match="no"), attempts.attempt("a way"):
            raise ValueError("no")
    assert list(tmp_path.iterdir()) == []
    with attempts.attempt("a way"):
        forget_open_attempts()
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "a-way").write_text("damaged")
    assert not attempts.is_refused("a way")


def test_each_gpu_of_a_machine_has_attempts_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directories = set()
    for uuid in ("GPU-1", "GPU-2"):
        gpu = SimpleNamespace(uuid=uuid)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, gpu=gpu: gpu)
        directory = loader._attempts_directory(config(compile_cache=tmp_path), "cuda")
        assert directory and directory.parts[-2:] == ("attempts", uuid)
        directories.add(directory)
    assert len(directories) == 2
    assert loader._attempts_directory(config(compile_cache=tmp_path), "cpu") is None
