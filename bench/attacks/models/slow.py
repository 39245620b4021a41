"""bench/slow: a step takes a while, so that most requests are cancelled while they still wait."""

import time
from collections.abc import Sequence
from typing import Any

from tests.support.fake_models import NullEngine, NullModel


class SlowEngine(NullEngine):
    """Sleeps in each step."""

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        """As NullEngine does, later."""
        time.sleep(0.02)
        return super().advance(painting)


MODEL = NullModel("bench/slow", SlowEngine)
