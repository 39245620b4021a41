"""Many clients at once: no errors, and nothing that was acknowledged is missing. The figures are `bench.load`'s."""

import os

import pytest

from bench.load import under_load


@pytest.mark.parametrize(
    ("clients", "seconds"),
    [
        (4, 0.2),
        *(pytest.param(clients, 60.0, marks=[pytest.mark.soak, pytest.mark.timeout(600)]) for clients in (64, 256)),
    ],
)
def test_under_load(clients: int, seconds: float) -> None:
    asked, submitted = under_load(clients, seconds)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {clients} clients, {seconds:g} s each")
    print(f"status, 500 queued: {asked}")
    print(f"submit: {submitted}")
    assert (asked.bad, submitted.bad) == (0, 0)
    # Each client had many of both.
    assert min(len(asked.seconds), len(submitted.seconds)) >= 2 * clients
