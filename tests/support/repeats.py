"""The numbers of the rounds of a repeated test: few in `make test`, many more in `make soak`."""

from typing import Any

import pytest


def round_params(few: int, many: int) -> list[Any]:
    """List the numbers of `few` rounds, and of `many` more that are marked as soak. Tests use them as random seeds."""
    return [
        *range(few),
        *(pytest.param(number, marks=pytest.mark.soak, id=f"soak-{number}") for number in range(many)),
    ]
