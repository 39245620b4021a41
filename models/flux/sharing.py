"""The decision whether a shared forward pays off, timed for each size once per process.

Only forwards that requests need anyway are timed, so the timing is free and covers sizes that no warm-up ran.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

#: A forward of two images is shared if it costs less than this many forwards of one. Two equal requests that take turns
#: finish after 1 and 2 forwards a step, 1.5 on average; if they share, both finish after the cost of a shared forward.
PAYS_BELOW = 1.5
#: How many forwards of one image, and of two, are timed; the fastest of each counts.
SAMPLES = 3


class Sharing:
    """The number of images per forward. `clock` waits for the device and returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds: dict[tuple[Hashable, int], list[float]] = {}

    def number(self, size: Hashable, wanted: int) -> int:
        """Return how many of the `wanted` images of this size go through the next forward."""
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
        """Time the block, a forward of `number` images, until there are enough samples for this size."""
        samples = self._seconds.get((size, number))
        if samples is None or len(samples) >= SAMPLES:
            yield
            return
        started = self._clock()
        yield
        samples.append(self._clock() - started)
