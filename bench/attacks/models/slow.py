"""The model bench/slow: each step takes 20 ms, so that most requests are cancelled while they still wait."""

import time
from collections.abc import Sequence
from typing import Any

from tests.support.fake_models import NullEngine, NullModel


class SlowEngine(NullEngine):
    """An engine that sleeps in each step."""

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        """Sleep, then advance like NullEngine."""
        time.sleep(0.02)
        return super().advance(task)


MODEL = NullModel("bench/slow", SlowEngine)
