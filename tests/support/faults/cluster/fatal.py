"""test/fatal: its process ends by the signal in the prompt, in the second step of a picture."""

import signal
import threading
from collections.abc import Sequence
from typing import Any

from tests.support.fake_models import NullEngine, NullModel


class FatalEngine(NullEngine):
    """What a crash inside a driver looks like from outside."""

    def advance(self, painting: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        if painting.step == 1 and painting.request.prompt.startswith("SIG"):
            signal.pthread_kill(threading.get_ident(), signal.Signals[painting.request.prompt])
        return super().advance(painting)


MODEL = NullModel("test/fatal", FatalEngine)
