"""Whether a shared forward pays: timed for each size, once in the life of the process.

Timed on forwards that requests need anyway, so that it costs nothing and holds for sizes that no warm-up thought of.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

#: A forward of two generations is shared when it costs less than so many of one. Two equal requests end after 1 and 2
#: forwards a step when they take turns, and both after the cost of a shared one: below 1.5, nobody waits longer for it
#: on average.
PAYS_BELOW = 1.5
#: How many forwards of one generation, and of two, are timed; the quickest of each counts.
SAMPLES = 3


class Sharing:
    """How many generations go through a forward. `clock` gives seconds, once the device has done its work."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds: dict[tuple[Hashable, int], list[float]] = {}

    def number(self, size: Hashable, wanted: int) -> int:
        """How many of the `wanted` generations of this size go through the next forward."""
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
        """Around a forward of so many generations, for which `number` was asked; timed until enough is known."""
        samples = self._seconds.get((size, number))
        if samples is None or len(samples) >= SAMPLES:
            yield
            return
        started = self._clock()
        yield
        samples.append(self._clock() - started)
