"""The decision whether images of one size share forwards, based on timings of the first forwards of that size.

Only forwards that requests need anyway are timed, so the decision costs no extra forwards.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

#: Images share forwards if a forward of two takes less than this many times as long as a forward of one. If two equal
#: requests take turns, one has its step after 1 forward and the other after 2, which is 1.5 on average. If they share,
#: both have their step after the shared forward.
PAYS_BELOW = 1.5
#: How many forwards of one image, and of two, are timed per size. The fastest of each counts.
SAMPLES = 3


class Sharing:
    """The choice of how many images go through a forward. `clock` waits for the device and returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds: dict[tuple[Hashable, int], list[float]] = {}

    def number(self, size: Hashable, wanted: int) -> int:
        """Return how many of the `wanted` images of this size should go through the next forward."""
        if wanted == 1:
            return 1
        alone, pair = (self._seconds.setdefault((size, number), []) for number in (1, 2))
        if len(alone) < SAMPLES:
            return 1
        if len(pair) < SAMPLES:
            return 2
        return wanted if min(pair) < PAYS_BELOW * min(alone) else 1

    @contextmanager
    def timed(self, size: Hashable, number: int) -> Iterator[None]:
        """Time the block, a forward of `number` images, if timings for this size and number are still needed."""
        samples = self._seconds.get((size, number))
        if samples is None or len(samples) >= SAMPLES:
            yield
            return
        started = self._clock()
        yield
        samples.append(self._clock() - started)
