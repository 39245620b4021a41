"""test/fatal: kills its process with the signal in the prompt, in the second step of a task."""

import signal
import threading
from collections.abc import Sequence
from typing import Any

from tests.support.fake_models import NullEngine, NullModel


class FatalEngine(NullEngine):
    """An engine that ends its process, as a crash of a GPU driver would."""

    def advance(self, task: Any, others: Sequence[Any] = ()) -> Sequence[Any]:
        if task.step == 1 and task.request.prompt.startswith("SIG"):
            signal.pthread_kill(threading.get_ident(), signal.Signals[task.request.prompt])
        return super().advance(task)


MODEL = NullModel("test/fatal", FatalEngine)
