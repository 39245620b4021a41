"""Which GPU takes the next job."""

from dataclasses import dataclass

import pytest

from server.cluster import router
from server.cluster.router import CacheAffinity, Router
from server.queue.jobs import Job, Mode, Priority, State


@dataclass(eq=False)
class Place:
    number: int
    incarnation: int = 1
    accepts_jobs: bool = True
    load: tuple[int, int] = (0, 0)


def job(hint: str | None = None, priority: Priority = Priority.NORMAL) -> Job:
    return Job(1, "one", "test/null", "me", Mode.QUEUE, priority, "http://here", State.IN_PROGRESS, runner_hint=hint)


def of(size: str = "square", prompt: str = "x") -> CacheAffinity:
    return CacheAffinity(size, prompt)


@pytest.fixture
def three() -> tuple[Router[Place], list[Place]]:
    made, places = Router[Place](2), [Place(0), Place(1), Place(2)]
    for place in places:
        made.update(place)
    return made, places


def test_traits_are_the_size_and_the_prompt_of_an_input() -> None:
    assert CacheAffinity.of('{"prompt": "x", "image_size": {"width": 64, "height": 32}}') == CacheAffinity(
        '{"width": 64, "height": 32}', "x"
    )
    assert CacheAffinity.of("{}") == CacheAffinity("null", "None")


def test_who_has_least_to_do_comes_first(three: tuple[Router[Place], list[Place]]) -> None:
    made, (first, second, third) = three
    first.load, third.load = (1, 0), (2, 0)
    for place in (first, third):
        made.update(place)
    assert made.route(job(), of()) is second
    second.load = (1, 0)
    made.update(second)
    assert made.route(job(), of("other", "other")) is first
    third.accepts_jobs = False
    made.update(third)
    for place in (first, second):
        place.load = (2, 0)
        made.update(place)
    assert not made.has_room


def test_of_the_idle_ones_who_has_most_at_hand(three: tuple[Router[Place], list[Place]]) -> None:
    made, (first, second, third) = three
    assert made.route(job(), of("square", "a cat")) is first
    first.load = (1, 0)
    made.update(first)
    assert made.route(job(), of("portrait", "a dog")) is second
    first.load = (0, 0)
    made.update(first)
    assert made.route(job(), of("portrait", "a cat")) is second
    assert made.route(job(), of("landscape", "a dog")) is second
    assert made.route(job(), of("square", "a cow")) is first
    # Not at the price of waiting.
    second.load = (1, 0)
    made.update(second)
    assert made.route(job(), of("portrait", "a dog")) in (first, third)


def test_a_new_runner_has_nothing_at_hand(three: tuple[Router[Place], list[Place]]) -> None:
    made, (first, second, _) = three
    first.load = (1, 0)
    made.update(first)
    assert made.route(job(), of()) is second
    first.load, second.incarnation = (0, 0), 2
    made.update(first)
    made.update(second)
    assert made.route(job(), of()) is first


def test_low_priority_keeps_nobody_out(three: tuple[Router[Place], list[Place]]) -> None:
    made, places = three
    for place in places:
        place.load = (2, 1)
        made.update(place)
    assert (made.has_room, made.accepts_low_priority) == (True, False)
    assert made.route(job(), of()) is places[0]


def test_a_hint_is_followed_while_there_is_room(three: tuple[Router[Place], list[Place]]) -> None:
    made, (first, second, _) = three
    assert made.route(job("mine"), of()) is first
    first.load = (1, 0)
    made.update(first)
    assert made.route(job("mine"), of()) is first
    first.load = (2, 0)
    made.update(first)
    assert made.route(job("mine"), of()) is second
    second.load = (2, 2)
    made.update(second)
    assert made.route(job("mine"), of()) is second
    assert made.route(job("mine", Priority.LOW), of()) is not second


def test_who_is_gone_is_not_chosen(three: tuple[Router[Place], list[Place]]) -> None:
    made, (first, second, third) = three
    made.route(job("mine"), of())
    made.remove(first)
    made.remove(first)
    assert made.route(job("mine"), of()) is second
    made.remove(second)
    made.remove(third)
    assert (made.has_room, made.accepts_low_priority) == (False, False)


def test_no_more_is_remembered_than_is_worth_it(
    three: tuple[Router[Place], list[Place]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "HINTS", 2)
    monkeypatch.setattr(router, "KNOWN", 2)
    made, (first, second, _) = three
    for name in ("a", "b", "c"):
        assert made.route(job(name), of("square", name)) is first
    first.load = (1, 0)
    made.update(first)
    assert made.route(job("b"), of()) is first
    assert made.route(job("a"), of("landscape", "a")) is second
