"""A limit on a resource, such as memory or connections, that divides it between owners."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import TooManyRequests


class FairShare:
    """A limited resource. An owner may hold at most as much as then stays free: half if alone, less with others.

    Only for the event loop's thread.
    """

    def __init__(self, total: int, refusal: str, *, closes: bool = False) -> None:
        """Start with all free. `refusal` is the message for a refused client; `closes` also ends its connection."""
        self._total, self._refusal, self._closes = total, refusal, closes
        self._held: Counter[str] = Counter()

    @property
    def free(self) -> int:
        """The amount that is free."""
        return self._total - self._held.total()

    def acquire(self, owner: str, number: int = 1) -> None:
        """Hold `number` more for an owner. Raises TooManyRequests if they exceed the owner's share."""
        if not self._try_acquire(owner, number):
            raise TooManyRequests(self._refusal, closes=self._closes)

    def release(self, owner: str, number: int = 1) -> None:
        """Release `number` that an owner held."""
        self._held[owner] -= number
        if not self._held[owner]:
            del self._held[owner]

    @contextmanager
    def held(self, owner: str) -> Iterator[None]:
        """Hold one more for an owner until the block ends. Raises TooManyRequests as `acquire` does."""
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
