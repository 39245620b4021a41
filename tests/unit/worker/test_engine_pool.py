"""Tests of which weights are in memory: shared, loaded on demand, evicted when memory is short."""

import gc
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from models import discover
from models.base import Engine, EngineConfig, LoadProgress
from models.benchmark.random_weights import build
from models.flux.engine import FluxEngine
from models.flux.loader import load_engine
from models.flux_dev import FluxDevInput
from models.loading import pipeline
from models.loading.specs import DEMO
from server.queue.jobs import State
from server.worker.engine_pool import PAUSE_SECONDS, EnginePool
from server.worker.worker import Worker
from tests.support.components import Clock, Components
from tests.support.fake_models import NullEngine, NullModel
from tests.support.tiny_flux import difference, finish_task, make_request
from tests.unit.worker.test_worker import outcome_and_body, ready_worker, run_all, submit

DEV, KREA = "fal-ai/flux/dev", "fal-ai/flux/krea"


class RecordedModels:
    """Models that record in `events` each load ("+ endpoint") and each eviction ("- endpoint")."""

    def __init__(self, *endpoints: str) -> None:
        self.events: list[str] = []
        self.by_endpoint = {endpoint: NullModel(endpoint, self._factory(endpoint)) for endpoint in endpoints}

    def _factory(self, endpoint: str) -> Callable[[], NullEngine]:
        events = self.events

        class RecordedEngine(NullEngine):
            def close(self) -> None:
                events.append(f"- {endpoint}")

        def load() -> NullEngine:
            events.append(f"+ {endpoint}")
            return RecordedEngine()

        return load

    def pool(self, max_loaded: int = 0) -> EnginePool:
        configs = {endpoint: EngineConfig(None, "") for endpoint in self.by_endpoint}
        return EnginePool(self.by_endpoint, configs, max_loaded, lambda endpoint, loading: None)


def test_endpoints_on_the_same_weights_share_an_engine() -> None:
    models = discover()
    configs = {endpoint: EngineConfig(DEMO, "", "cpu") for endpoint in models}
    pool = EnginePool(models, configs, 0, lambda endpoint, loading: None)
    pool.setup()
    assert len({id(pool.get_loaded(endpoint)) for endpoint in models}) == 1


def test_setup_loads_as_many_engines_as_fit() -> None:
    models = RecordedModels("a/a", "a/b", "a/c")
    pool = models.pool(max_loaded=2)
    pool.setup()
    assert models.events == ["+ a/a", "+ a/b"]
    assert pool.get_loaded("a/c") is None
    assert "a/c" in pool
    assert "a/d" not in pool


def test_the_least_recently_used_engine_is_evicted() -> None:
    models = RecordedModels("a/a", "a/b", "a/c")
    pool = models.pool(max_loaded=2)
    pool.setup()
    pool.get_loaded("a/a")
    assert pool.load("a/c", ()) is pool.get_loaded("a/c")
    assert models.events[2:] == ["- a/b", "+ a/c"]


def test_an_engine_in_use_is_not_evicted() -> None:
    models = RecordedModels("a/a", "a/b", "a/c")
    pool = models.pool(max_loaded=2)
    pool.setup()
    first, second = pool.get_loaded("a/a"), pool.get_loaded("a/b")
    assert first and second
    assert pool.load("a/c", {first, second}) is None
    assert pool.load("a/c", {first}) is not None
    assert models.events[2:] == ["- a/b", "+ a/c"]


def test_an_engine_that_is_warming_up_is_not_evicted() -> None:
    """The memory of an engine cannot be freed before the compiler is done with the engine."""
    started, may_finish, idle = threading.Event(), threading.Event(), threading.Event()

    class Slow(NullEngine):
        def warm_up(self) -> bool:
            started.set()
            assert may_finish.wait(60)
            return False

    models = {"a/a": NullModel("a/a", Slow), "a/b": NullModel("a/b", NullEngine)}
    configs = {endpoint: EngineConfig(None, "") for endpoint in models}
    pool = EnginePool(models, configs, 1, lambda endpoint, loading: None, idle.set)
    pool.setup()
    pool.start_warming_up()
    assert started.wait(60)
    assert pool.load("a/b", ()) is None
    may_finish.set()
    assert idle.wait(60)
    assert pool.load("a/b", ()) is not None


def test_weights_that_fail_to_load_are_not_tried_again_at_once() -> None:
    clock = Clock()
    attempts: list[str] = []

    class Broken(NullModel):
        def setup(self, config: EngineConfig) -> NullEngine:
            attempts.append("a/b")
            raise OSError("a shard is missing")

    models = {"a/a": NullModel("a/a", NullEngine), "a/b": Broken("a/b", NullEngine)}
    configs = {endpoint: EngineConfig(None, "") for endpoint in models}
    pool = EnginePool(models, configs, 1, lambda endpoint, loading: None, clock=clock)
    pool.setup()
    for num_attempts in (1, 1, 2):
        with pytest.raises(OSError, match="a shard is missing"):
            pool.load("a/b", ())
        assert len(attempts) == num_attempts
        if num_attempts == 1:
            clock.now += PAUSE_SECONDS * 0.6
            assert pool.get_loaded("a/a") or pool.load("a/a", ())


def test_an_engine_fits_only_if_its_weights_fit_in_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = EngineConfig(DEMO, "", "cpu")
    assert pipeline.has_room(demo)
    monkeypatch.setattr(pipeline, "free_memory", lambda device: 1_000_000)
    assert not pipeline.has_room(demo)
    assert pipeline.has_room(EngineConfig("nobody/not-pulled", "", "cpu"))


# -- in the worker


def worker_on(components: Components, models: RecordedModels, **settings: Any) -> Worker:
    return ready_worker(components, *models.by_endpoint.values(), **settings)


def test_a_request_for_other_weights_waits_until_earlier_requests_are_done(components: Components) -> None:
    models = RecordedModels("a/a", "a/b")
    worker = worker_on(components, models, max_loaded=1)
    first, other, behind = (submit(components, endpoint) for endpoint in ("a/a", "a/b", "a/a"))
    worker.run_once()
    assert (first.state, first.step) == (State.IN_PROGRESS, 1)
    run_all(worker)
    assert [outcome_and_body(components, job)[0].status for job in (first, other, behind)] == [200] * 3
    assert models.events == ["+ a/a", "- a/a", "+ a/b", "- a/b", "+ a/a"]


def test_all_requests_that_wait_for_the_same_weights_start_together(components: Components) -> None:
    models = RecordedModels("a/a", "a/b")
    worker = worker_on(components, models, max_loaded=1)
    jobs = [submit(components, endpoint) for endpoint in ("a/a", "a/b", "a/a", "a/b", "a/a", "a/b")]
    run_all(worker)
    assert [outcome_and_body(components, job)[0].status for job in jobs] == [200] * 6
    # Two switches of weights. In order of arrival there would be five.
    assert models.events.count("+ a/b") == 1
    assert models.events.count("+ a/a") == 2


def test_a_waiting_request_logs_the_progress_of_loading(components: Components) -> None:
    class ReportingModel(NullModel):
        def setup(self, config: EngineConfig) -> NullEngine:
            config.report(LoadProgress("transformer", 1_000_000_000, 4_000_000_000))
            return super().setup(config)

    worker = ready_worker(components, NullModel("a/a", NullEngine), ReportingModel("a/b", NullEngine), max_loaded=1)
    job = submit(components, "a/b")
    run_all(worker)
    assert job.logs[0]["message"] == "a/b: loading transformer, 1.0 of 4.0 GB loaded"


def test_weights_that_cannot_be_loaded_fail_only_their_requests(components: Components) -> None:
    class Broken(NullModel):
        def setup(self, config: EngineConfig) -> NullEngine:
            raise OSError("a shard is missing")

    worker = ready_worker(components, NullModel("a/a", NullEngine), Broken("a/b", NullEngine), max_loaded=1)
    jobs = [submit(components, endpoint) for endpoint in ("a/b", "a/a")]
    run_all(worker)
    assert [outcome_and_body(components, job)[0].status for job in jobs] == [500, 200]


def test_a_cancelled_request_does_not_wait_for_weights(components: Components) -> None:
    models = RecordedModels("a/a", "a/b")
    worker = worker_on(components, models, max_loaded=1)
    submit(components, "a/a", num_inference_steps=9)
    other = submit(components, "a/b")
    worker.run_once()
    assert components.queue.cancel(other) == State.IN_PROGRESS
    worker.run_once()
    assert other.state == State.COMPLETED
    assert "+ a/b" not in models.events


# -- real weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny pipeline with random weights and return its directory."""
    directory = tmp_path_factory.mktemp("tiny")
    build("tiny", "cpu", torch.bfloat16).save_pretrained(directory)
    shutil.copytree(DEMO / "safety_checker", directory / "safety_checker")
    return directory


@pytest.mark.timeout(300)
@pytest.mark.parametrize("turns", [20, pytest.param(100, marks=pytest.mark.thorough)])
def test_switches_between_weights(tiny: Path, turns: int) -> None:
    """Memory does not grow, and the images equal those of engines that never switch."""
    models = {endpoint: model for endpoint, model in discover().items() if endpoint in (DEV, KREA)}
    configs = {DEV: EngineConfig(DEMO, "", "cpu"), KREA: EngineConfig(tiny, "", "cpu")}
    request = make_request("a fish", 64, 64)
    expected = {endpoint: _generate(load_engine(config), request) for endpoint, config in configs.items()}
    pool = EnginePool(models, configs, 1, lambda endpoint, loading: None)
    pool.setup()
    memory_used: list[int] = []
    # Exclude existing objects from garbage collection. In a long test run, scanning them takes a second each time.
    gc.collect()
    gc.freeze()
    for turn in range(turns):
        endpoint = (DEV, KREA)[turn % 2]
        engine = pool.get_loaded(endpoint) or pool.load(endpoint, ())
        assert isinstance(engine, FluxEngine)
        assert difference(_generate(engine, request), expected[endpoint]) == 0
        del engine
        gc.collect()
        memory_used.append(psutil.Process().memory_info().rss)
    gc.unfreeze()
    # Not `isinstance`: reading `__class__` of some old PyTorch modules emits a warning. The compiler keeps fake
    # tensors, which have no memory, if another test of this process has compiled.
    tensors = [
        item
        for item in gc.get_objects()
        if issubclass(type(item), torch.Tensor) and not issubclass(type(item), FakeTensor)
    ]
    assert not [tensor.shape for tensor in tensors if tensor.numel() > 500_000]
    tenth = turns // 10
    assert max(memory_used[-tenth:]) < max(memory_used[tenth : 2 * tenth]) + 50_000_000


def _generate(engine: Engine, request: FluxDevInput) -> Any:
    assert isinstance(engine, FluxEngine)
    (image,) = finish_task(engine, engine.start(request, 1))
    return image
