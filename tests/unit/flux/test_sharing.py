"""Tests of how the server measures whether shared forwards are faster: once for each size, while requests run."""

import pytest

from models.flux.sharing import PAYS_BELOW, SAMPLES, Sharing
from tests.support import tiny_flux
from tests.support.tiny_flux import make_request, record_batch_sizes


class Costs:
    """Clock that each forward advances by its cost; `seconds` are the costs of forwards of 1, 2, ... samples."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = dict(enumerate(seconds, 1))
        self.now = 0.0
        self.sharing = Sharing(lambda: self.now)

    def forward(self, size: str, wanted: int) -> int:
        """Run a forward for at most `wanted` samples, and return how many share it."""
        number = self.sharing.number(size, wanted)
        with self.sharing.timed(size, number):
            self.now += self.seconds[number]
        return number


@pytest.mark.parametrize(("pair", "expected_number"), [(1.2, 3), (PAYS_BELOW - 0.01, 3), (PAYS_BELOW, 1), (2.0, 1)])
def test_forwards_are_shared_only_where_two_together_cost_clearly_less_than_two_alone(
    pair: float, expected_number: int
) -> None:
    costs = Costs(1.0, pair, 2.5)
    assert [costs.forward("a", 3) for _ in range(2 * SAMPLES)] == [1] * SAMPLES + [2] * SAMPLES
    assert [costs.forward("a", 3) for _ in range(4)] == [expected_number] * 4


def test_the_fastest_measurement_of_each_number_counts() -> None:
    costs = Costs(1.0, 1.2)
    for seconds in (5.0, 1.0, 1.0):
        costs.seconds[1] = seconds
        costs.forward("a", 2)
    for seconds in (9.0, 9.0, 1.2):
        costs.seconds[2] = seconds
        costs.forward("a", 2)
    assert costs.forward("a", 2) == 2


def test_each_size_is_measured_separately() -> None:
    costs = Costs(1.0, 1.2)
    for _ in range(2 * SAMPLES):
        costs.forward("a", 2)
    assert (costs.forward("a", 2), costs.forward("b", 2)) == (2, 1)


def test_forwards_without_a_partner_are_not_measured() -> None:
    costs = Costs(1.0, 1.2)
    assert [costs.forward("a", 1) for _ in range(9)] == [1] * 9
    assert [costs.forward("a", 2) for _ in range(SAMPLES + 1)] == [1] * SAMPLES + [2]


@pytest.mark.parametrize(("pair", "batch"), [(1.2, 2), (2.0, 1)])
def test_the_engine_shares_forwards_by_measurement(pair: float, batch: int) -> None:
    engine, costs = tiny_flux.engine(), Costs(1.0, pair)
    engine.sharing = costs.sharing
    tasks = [engine.start(make_request(num_inference_steps=20, acceleration="regular"), seed) for seed in (1, 2)]

    def forward(module: object, inputs: object, named: dict[str, list[object]]) -> None:
        costs.now += costs.seconds[len(named["hidden_states"])]

    engine.pipeline.transformer.register_forward_pre_hook(forward, with_kwargs=True)
    with record_batch_sizes(engine.pipeline.transformer) as batch_sizes:
        for _ in range(2 * SAMPLES + 4):
            engine.advance(tasks[0], tasks[1:])
    assert batch_sizes == [1] * SAMPLES + [2] * SAMPLES + [batch] * 4
