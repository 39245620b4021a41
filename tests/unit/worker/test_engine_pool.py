"""Which weights are in memory: shared, loaded when asked for, let go in time."""

import gc
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from models import discover
from models.base import Engine, EngineConfig, LoadProgress
from models.benchmark.random_weights import build
from models.flux.engine import FluxEngine
from models.flux_dev import FluxDevInput
from models.loading import pipeline
from models.loading.specs import DEMO
from server.queue.jobs import State
from server.worker.engine_pool import PAUSE_SECONDS, EnginePool
from tests.support.components import Clock, Parts
from tests.support.fake_models import NullEngine, NullModel
from tests.support.tiny_flux import asked, difference, finished
from tests.unit.worker.test_worker import answer, submitted, worked_off

DEV, KREA, OVER = "fal-ai/flux/dev", "fal-ai/flux/krea", "fal-ai/flux/dev/image-to-image"


class Shelf:
    """Models whose engines are told apart, and what was loaded and let go."""

    def __init__(self, *endpoints: str) -> None:
        self.happened: list[str] = []
        self.models = {endpoint: NullModel(endpoint, self._maker(endpoint)) for endpoint in endpoints}

    def _maker(self, endpoint: str) -> Callable[[], NullEngine]:
        shelf = self

        class Shelved(NullEngine):
            def close(self) -> None:
                shelf.happened.append(f"- {endpoint}")

        def make() -> NullEngine:
            shelf.happened.append(f"+ {endpoint}")
            return Shelved()

        return make

    def engines(self, max_loaded: int = 0) -> EnginePool:
        placements = {endpoint: EngineConfig(None, "") for endpoint in self.models}
        return EnginePool(self.models, placements, max_loaded, lambda endpoint, loading: None)


def test_endpoints_on_the_same_weights_share_an_engine() -> None:
    models = discover()
    placements = {endpoint: EngineConfig(DEMO, "", "cpu") for endpoint in models}
    engines = EnginePool(models, placements, 0, lambda endpoint, loading: None)
    engines.setup()
    assert len({id(engines.get_loaded(endpoint)) for endpoint in models}) == 1


def test_as_many_are_loaded_as_there_is_room_for() -> None:
    shelf = Shelf("a/a", "a/b", "a/c")
    engines = shelf.engines(max_loaded=2)
    engines.setup()
    assert shelf.happened == ["+ a/a", "+ a/b"]
    assert engines.get_loaded("a/c") is None
    assert "a/c" in engines
    assert "a/d" not in engines


def test_the_least_recently_used_makes_room() -> None:
    shelf = Shelf("a/a", "a/b", "a/c")
    engines = shelf.engines(max_loaded=2)
    engines.setup()
    engines.get_loaded("a/a")
    assert engines.load("a/c", ()) is engines.get_loaded("a/c")
    assert shelf.happened[2:] == ["- a/b", "+ a/c"]


def test_what_is_in_use_stays() -> None:
    shelf = Shelf("a/a", "a/b", "a/c")
    engines = shelf.engines(max_loaded=2)
    engines.setup()
    first, second = engines.get_loaded("a/a"), engines.get_loaded("a/b")
    assert first and second
    assert engines.load("a/c", {first, second}) is None
    assert engines.load("a/c", {first}) is not None
    assert shelf.happened[2:] == ["- a/b", "+ a/c"]


def test_what_is_being_warmed_up_is_not_let_go() -> None:
    """Its memory could not be had before the compiler is done with it."""
    begun, go_on, idle = threading.Event(), threading.Event(), threading.Event()

    class Slow(NullEngine):
        def warm_up(self) -> bool:
            begun.set()
            assert go_on.wait(60)
            return False

    models = {"a/a": NullModel("a/a", Slow), "a/b": NullModel("a/b", NullEngine)}
    placements = {endpoint: EngineConfig(None, "") for endpoint in models}
    engines = EnginePool(models, placements, 1, lambda endpoint, loading: None, idle.set)
    engines.setup()
    engines.start_warming_up()
    assert begun.wait(60)
    assert engines.load("a/b", ()) is None
    go_on.set()
    assert idle.wait(60)
    assert engines.load("a/b", ()) is not None


def test_weights_that_cannot_be_loaded_push_nobody_out_again_and_again() -> None:
    clock = Clock()
    happened: list[str] = []

    class Broken(NullModel):
        def setup(self, placement: EngineConfig) -> NullEngine:
            happened.append("tried")
            raise OSError("a shard is missing")

    models = {"a/a": NullModel("a/a", NullEngine), "a/b": Broken("a/b", NullEngine)}
    placements = {endpoint: EngineConfig(None, "") for endpoint in models}
    engines = EnginePool(models, placements, 1, lambda endpoint, loading: None, clock=clock)
    engines.setup()
    for tried in (1, 1, 2):
        with pytest.raises(OSError, match="a shard is missing"):
            engines.load("a/b", ())
        assert len(happened) == tried
        if tried == 1:
            clock.now += PAUSE_SECONDS * 0.6
            assert engines.get_loaded("a/a") or engines.load("a/a", ())


def test_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = EngineConfig(DEMO, "", "cpu")
    assert pipeline.has_room(demo)
    monkeypatch.setattr(pipeline, "free_memory", lambda device: 1_000_000)
    assert not pipeline.has_room(demo)
    assert pipeline.has_room(EngineConfig("nobody/not-pulled", "", "cpu"))


# -- in the worker


def worker_on(parts: Parts, shelf: Shelf, **settings: Any) -> Any:
    from tests.unit.worker.test_worker import ready

    return ready(parts, *shelf.models.values(), **settings)


def test_a_request_for_other_weights_waits_until_those_before_are_done(parts: Parts) -> None:
    shelf = Shelf("a/a", "a/b")
    worker = worker_on(parts, shelf, max_loaded=1)
    first, other, behind = (submitted(parts, endpoint) for endpoint in ("a/a", "a/b", "a/a"))
    worker.run_once()
    assert (first.state, first.step) == (State.IN_PROGRESS, 1)
    worked_off(worker)
    assert [answer(parts, job)[0].status for job in (first, other, behind)] == [200] * 3
    assert shelf.happened == ["+ a/a", "- a/a", "+ a/b", "- a/b", "+ a/a"]


def test_all_who_wait_for_the_same_weights_begin_together(parts: Parts) -> None:
    shelf = Shelf("a/a", "a/b")
    worker = worker_on(parts, shelf, max_loaded=1)
    jobs = [submitted(parts, endpoint) for endpoint in ("a/a", "a/b", "a/a", "a/b", "a/a", "a/b")]
    worked_off(worker)
    assert [answer(parts, job)[0].status for job in jobs] == [200] * 6
    # Two more switches, where one after the other would have made five.
    assert shelf.happened.count("+ a/b") == 1
    assert shelf.happened.count("+ a/a") == 2


def test_who_waits_is_told_of_the_loading(parts: Parts) -> None:
    class Telling(NullModel):
        def setup(self, placement: EngineConfig) -> NullEngine:
            placement.report(LoadProgress("transformer", 1_000_000_000, 4_000_000_000))
            return super().setup(placement)

    from tests.unit.worker.test_worker import ready

    worker = ready(parts, NullModel("a/a", NullEngine), Telling("a/b", NullEngine), max_loaded=1)
    job = submitted(parts, "a/b")
    worked_off(worker)
    assert job.logs[0]["message"] == "a/b: loading transformer, 1.0 of 4.0 GB loaded"


def test_weights_that_cannot_be_loaded_fail_their_own_requests(parts: Parts) -> None:
    class Broken(NullModel):
        def setup(self, placement: EngineConfig) -> NullEngine:
            raise OSError("a shard is missing")

    from tests.unit.worker.test_worker import ready

    worker = ready(parts, NullModel("a/a", NullEngine), Broken("a/b", NullEngine), max_loaded=1)
    jobs = [submitted(parts, endpoint) for endpoint in ("a/b", "a/a")]
    worked_off(worker)
    assert [answer(parts, job)[0].status for job in jobs] == [500, 200]


def test_a_cancelled_one_does_not_wait_for_weights(parts: Parts) -> None:
    shelf = Shelf("a/a", "a/b")
    worker = worker_on(parts, shelf, max_loaded=1)
    submitted(parts, "a/a", num_inference_steps=9)
    other = submitted(parts, "a/b")
    worker.run_once()
    assert parts.queue.cancel(other) == State.IN_PROGRESS
    worker.run_once()
    assert other.state == State.COMPLETED
    assert "+ a/b" not in shelf.happened


# -- real weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in a folder of their own."""
    folder = tmp_path_factory.mktemp("tiny")
    build("tiny", "cpu", torch.bfloat16).save_pretrained(folder)
    shutil.copytree(DEMO / "safety_checker", folder / "safety_checker")
    return folder


@pytest.mark.timeout(300)
def test_a_hundred_switches(tiny: Path) -> None:
    """Memory stays flat, and pictures are those of engines that are alone."""
    models = {endpoint: model for endpoint, model in discover().items() if endpoint in (DEV, KREA)}
    placements = {DEV: EngineConfig(DEMO, "", "cpu"), KREA: EngineConfig(tiny, "", "cpu")}
    request = asked("a fish", 64, 64)
    expected = {name: _painted(FluxEngine.load(place), request) for name, place in placements.items()}
    engines = EnginePool(models, placements, 1, lambda endpoint, loading: None)
    engines.setup()
    used: list[int] = []
    # What was there before is looked through no more: in a long run of tests that is a second each time.
    gc.collect()
    gc.freeze()
    for turn in range(100):
        endpoint = (DEV, KREA)[turn % 2]
        engine = engines.get_loaded(endpoint) or engines.load(endpoint, ())
        assert isinstance(engine, FluxEngine)
        assert difference(_painted(engine, request), expected[endpoint]) == 0
        del engine
        gc.collect()
        used.append(psutil.Process().memory_info().rss)
    gc.unfreeze()
    # By its type alone: asking some of PyTorch's old modules for their class warns.
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    assert not [each.shape for each in tensors if each.numel() > 500_000]
    assert max(used[90:]) < max(used[10:20]) + 50_000_000


def _painted(engine: Engine, request: FluxDevInput) -> Any:
    assert isinstance(engine, FluxEngine)
    (picture,) = finished(engine, engine.start(request, 1))
    return picture
