"""Bounds a resource, such as memory or connections, and divides it between owners."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import TooManyRequests


class FairShare:
    """An owner may hold as much as is left for the others then: half of it all alone, and less beside others.

    For the event loop's thread alone.
    """

    def __init__(self, total: int, refusal: str, *, closes: bool = False) -> None:
        """`refusal` is what a client is told who asks for too much; with `closes` its connection ends with that."""
        self._total, self._refusal, self._closes = total, refusal, closes
        self._held: Counter[str] = Counter()

    @property
    def free(self) -> int:
        """How much of it no owner holds."""
        return self._total - self._held.total()

    def acquire(self, owner: str, number: int = 1) -> None:
        """Hold so many more. Raises TooManyRequests."""
        if not self._try_acquire(owner, number):
            raise TooManyRequests(self._refusal, closes=self._closes)

    def release(self, owner: str, number: int = 1) -> None:
        """Hold so many no more."""
        self._held[owner] -= number
        if not self._held[owner]:
            del self._held[owner]

    @contextmanager
    def held(self, owner: str) -> Iterator[None]:
        """One more while the block lasts. Raises TooManyRequests."""
        self.acquire(owner)
        try:
            yield
        finally:
            self.release(owner)

    def _try_acquire(self, owner: str, number: int) -> bool:
        if number and self._held[owner] + number > self.free - number:
            return False
        self._held[owner] += number
        return True
