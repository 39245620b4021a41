"""test/slow: sleeps 20 ms in each step, as a busy GPU would."""

import time
from collections.abc import Sequence
from typing import Any

from tests.support.fake_models import NullEngine, NullModel

SECONDS = 0.02


class SlowEngine(NullEngine):
    """Takes its time and no processor's."""

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        time.sleep(SECONDS)
        return super().advance(painting)


MODEL = NullModel("test/slow", SlowEngine)
