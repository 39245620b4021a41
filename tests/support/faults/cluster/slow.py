"""test/slow: sleeps 20 ms in each step, as if it waited for a GPU."""

import time
from collections.abc import Sequence
from typing import Any

from tests.support.fake_models import NullEngine, NullModel

SECONDS = 0.02


class SlowEngine(NullEngine):
    """An engine that takes time but no CPU time."""

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        time.sleep(SECONDS)
        return super().advance(task)


MODEL = NullModel("test/slow", SlowEngine)
