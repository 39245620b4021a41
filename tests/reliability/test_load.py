"""Tests with many clients of `bench.load` at once: no errors, and no acknowledged request is missing."""

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
    polls, submits = under_load(clients, seconds)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {clients} clients, {seconds:g} s each")
    print(f"status, 500 queued: {polls}")
    print(f"submit: {submits}")
    assert (polls.bad, submits.bad) == (0, 0)
    # The clients made, on average, at least two requests of each kind.
    assert min(len(polls.seconds), len(submits.seconds)) >= 2 * clients
