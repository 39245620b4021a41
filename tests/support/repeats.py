"""The numbers of the rounds of a repeated test: few in `make test`, many more in `make soak`."""

from typing import Any

import pytest


def round_params(few: int, many: int) -> list[Any]:
    """Return parameters: the numbers of `few` rounds, then of `many` rounds marked as soak. Tests use them as seeds."""
    return [
        *range(few),
        *(pytest.param(number, marks=pytest.mark.soak, id=f"soak-{number}") for number in range(many)),
    ]
