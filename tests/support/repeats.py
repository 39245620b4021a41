"""Numbers of rounds of a repeated test: few in `make test`, many in `make soak`."""

from typing import Any

import pytest


def round_params(few: int, many: int) -> list[Any]:
    """List the rounds' numbers, which tests use as random seeds; the additional `many` are marked as soak."""
    return [
        *range(few),
        *(pytest.param(number, marks=pytest.mark.soak, id=f"soak-{number}") for number in range(many)),
    ]
