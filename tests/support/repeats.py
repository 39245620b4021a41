"""How often a test is done: a few rounds in `make test`, many in `make soak`."""

from typing import Any

import pytest


def rounds(few: int, many: int) -> list[Any]:
    """The numbers of the rounds, which seed whatever is random in them; those of the soak carry its marker."""
    return [
        *range(few),
        *(pytest.param(number, marks=pytest.mark.soak, id=f"soak-{number}") for number in range(many)),
    ]
