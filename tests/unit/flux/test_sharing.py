"""Whether a shared forward pays: measured once a size, on forwards that are needed anyway."""

import pytest

from models.flux.sharing import PAYS_BELOW, SAMPLES, Sharing
from tests.support import tiny_flux
from tests.support.tiny_flux import asked, batches


class Costs:
    """A clock that a forward moves by what so many generations cost."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = dict(enumerate(seconds, 1))
        self.now = 0.0
        self.sharing = Sharing(lambda: self.now)

    def forward(self, size: str, wanted: int) -> int:
        """Who goes through it."""
        number = self.sharing.number(size, wanted)
        with self.sharing.timed(size, number):
            self.now += self.seconds[number]
        return number


@pytest.mark.parametrize(("pair", "then"), [(1.2, 3), (PAYS_BELOW - 0.01, 3), (PAYS_BELOW, 1), (2.0, 1)])
def test_it_is_shared_only_where_two_cost_clearly_less_than_two_alone(pair: float, then: int) -> None:
    costs = Costs(1.0, pair, 2.5)
    assert [costs.forward("a", 3) for _ in range(2 * SAMPLES)] == [1] * SAMPLES + [2] * SAMPLES
    assert [costs.forward("a", 3) for _ in range(4)] == [then] * 4


def test_the_quickest_of_each_counts() -> None:
    costs = Costs(1.0, 1.2)
    for seconds in (5.0, 1.0, 1.0):
        costs.seconds[1] = seconds
        costs.forward("a", 2)
    for seconds in (9.0, 9.0, 1.2):
        costs.seconds[2] = seconds
        costs.forward("a", 2)
    assert costs.forward("a", 2) == 2


def test_each_size_is_measured_by_itself() -> None:
    costs = Costs(1.0, 1.2)
    for _ in range(2 * SAMPLES):
        costs.forward("a", 2)
    assert (costs.forward("a", 2), costs.forward("b", 2)) == (2, 1)


def test_who_is_alone_is_not_measured() -> None:
    costs = Costs(1.0, 1.2)
    assert [costs.forward("a", 1) for _ in range(9)] == [1] * 9
    assert [costs.forward("a", 2) for _ in range(SAMPLES + 1)] == [1] * SAMPLES + [2]


@pytest.mark.parametrize(("pair", "batch"), [(1.2, 2), (2.0, 1)])
def test_the_engine_asks_it(pair: float, batch: int) -> None:
    engine, costs = tiny_flux.engine(), Costs(1.0, pair)
    engine.sharing = costs.sharing
    requests = [engine.start(asked(num_inference_steps=20, acceleration="regular"), seed) for seed in (1, 2)]

    def forward(module: object, inputs: object, named: dict[str, list[object]]) -> None:
        costs.now += costs.seconds[len(named["hidden_states"])]

    engine.pipeline.transformer.register_forward_pre_hook(forward, with_kwargs=True)
    with batches(engine.pipeline.transformer) as seen:
        for _ in range(2 * SAMPLES + 4):
            engine.advance(requests[0], requests[1:])
    assert seen == [1] * SAMPLES + [2] * SAMPLES + [batch] * 4
