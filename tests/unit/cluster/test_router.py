"""Tests of the router: which GPU takes the next job."""

from dataclasses import dataclass

import pytest

from server.cluster import router
from server.cluster.router import CacheAffinity, Router
from server.queue.jobs import Job, Mode, Priority, State


@dataclass(eq=False)
class Slot:
    number: int
    incarnation: int = 1
    accepts_jobs: bool = True
    load: tuple[int, int] = (0, 0)


def job(hint: str | None = None, priority: Priority = Priority.NORMAL) -> Job:
    return Job(1, "one", "test/null", "me", Mode.QUEUE, priority, "http://here", State.IN_PROGRESS, runner_hint=hint)


def affinity(size: str = "square", prompt: str = "x") -> CacheAffinity:
    return CacheAffinity(size, prompt)


@pytest.fixture
def three_slots() -> tuple[Router[Slot], list[Slot]]:
    slot_router, slots = Router[Slot](2), [Slot(0), Slot(1), Slot(2)]
    for slot in slots:
        slot_router.update(slot)
    return slot_router, slots


def test_the_affinity_is_the_size_and_the_prompt_of_an_input() -> None:
    assert CacheAffinity.of('{"prompt": "x", "image_size": {"width": 64, "height": 32}}') == CacheAffinity(
        '{"width": 64, "height": 32}', "x"
    )
    assert CacheAffinity.of("{}") == CacheAffinity("null", "None")


def test_the_least_loaded_gpu_takes_the_job(three_slots: tuple[Router[Slot], list[Slot]]) -> None:
    slot_router, (first, second, third) = three_slots
    first.load, third.load = (1, 0), (2, 0)
    for slot in (first, third):
        slot_router.update(slot)
    assert slot_router.route(job(), affinity()) is second
    second.load = (1, 0)
    slot_router.update(second)
    assert slot_router.route(job(), affinity("other", "other")) is first
    third.accepts_jobs = False
    slot_router.update(third)
    for slot in (first, second):
        slot.load = (2, 0)
        slot_router.update(slot)
    assert not slot_router.has_room


def test_among_idle_gpus_the_one_with_the_most_cached_takes_the_job(
    three_slots: tuple[Router[Slot], list[Slot]],
) -> None:
    slot_router, (first, second, third) = three_slots
    assert slot_router.route(job(), affinity("square", "a cat")) is first
    first.load = (1, 0)
    slot_router.update(first)
    assert slot_router.route(job(), affinity("portrait", "a dog")) is second
    first.load = (0, 0)
    slot_router.update(first)
    assert slot_router.route(job(), affinity("portrait", "a cat")) is second
    assert slot_router.route(job(), affinity("landscape", "a dog")) is second
    assert slot_router.route(job(), affinity("square", "a cow")) is first
    # A cached size and prompt are not worth waiting for.
    second.load = (1, 0)
    slot_router.update(second)
    assert slot_router.route(job(), affinity("portrait", "a dog")) in (first, third)


def test_a_new_runner_has_nothing_cached(three_slots: tuple[Router[Slot], list[Slot]]) -> None:
    slot_router, (first, second, _) = three_slots
    first.load = (1, 0)
    slot_router.update(first)
    assert slot_router.route(job(), affinity()) is second
    first.load, second.incarnation = (0, 0), 2
    slot_router.update(first)
    slot_router.update(second)
    assert slot_router.route(job(), affinity()) is first


def test_low_priority_does_not_block_normal_priority(three_slots: tuple[Router[Slot], list[Slot]]) -> None:
    slot_router, slots = three_slots
    for slot in slots:
        slot.load = (2, 1)
        slot_router.update(slot)
    assert (slot_router.has_room, slot_router.accepts_low_priority) == (True, False)
    assert slot_router.route(job(), affinity()) is slots[0]


def test_a_hint_is_followed_while_there_is_room(three_slots: tuple[Router[Slot], list[Slot]]) -> None:
    slot_router, (first, second, _) = three_slots
    assert slot_router.route(job("mine"), affinity()) is first
    first.load = (1, 0)
    slot_router.update(first)
    assert slot_router.route(job("mine"), affinity()) is first
    first.load = (2, 0)
    slot_router.update(first)
    assert slot_router.route(job("mine"), affinity()) is second
    second.load = (2, 2)
    slot_router.update(second)
    assert slot_router.route(job("mine"), affinity()) is second
    assert slot_router.route(job("mine", Priority.LOW), affinity()) is not second


def test_a_removed_gpu_is_not_chosen(three_slots: tuple[Router[Slot], list[Slot]]) -> None:
    slot_router, (first, second, third) = three_slots
    slot_router.route(job("mine"), affinity())
    slot_router.remove(first)
    slot_router.remove(first)
    assert slot_router.route(job("mine"), affinity()) is second
    slot_router.remove(second)
    slot_router.remove(third)
    assert (slot_router.has_room, slot_router.accepts_low_priority) == (False, False)


def test_the_number_of_remembered_hints_and_affinities_is_limited(
    three_slots: tuple[Router[Slot], list[Slot]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "HINTS", 2)
    monkeypatch.setattr(router, "KNOWN", 2)
    slot_router, (first, second, _) = three_slots
    for name in ("a", "b", "c"):
        assert slot_router.route(job(name), affinity("square", name)) is first
    first.load = (1, 0)
    slot_router.update(first)
    assert slot_router.route(job("b"), affinity()) is first
    assert slot_router.route(job("a"), affinity("landscape", "a")) is second
