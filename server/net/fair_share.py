"""A limited resource, such as memory or connections, that is divided between owners."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import TooManyRequests


class FairShare:
    """A limited resource that is divided between owners. Only for the event loop's thread.

    An owner that holds `held` gets `n` more only if `held + n <= free - n`: afterwards, the owner holds at most as much
    as is free. So an owner gets at most half of the total, and less while other owners hold some.
    """

    def __init__(self, total: int, refusal: str, *, closes: bool = False) -> None:
        """Start with `total` free. Refused clients get the message `refusal`; `closes` disconnects them too."""
        self._total, self._refusal, self._closes = total, refusal, closes
        self._held: Counter[str] = Counter()

    @property
    def free(self) -> int:
        """The amount that is free."""
        return self._total - self._held.total()

    def acquire(self, owner: str, number: int = 1) -> None:
        """Hold `number` units more for an owner. Raises TooManyRequests if they exceed the owner's share."""
        if not self._try_acquire(owner, number):
            raise TooManyRequests(self._refusal, closes=self._closes)

    def release(self, owner: str, number: int = 1) -> None:
        """Release `number` units that an owner holds."""
        self._held[owner] -= number
        if not self._held[owner]:
            del self._held[owner]

    @contextmanager
    def held(self, owner: str) -> Iterator[None]:
        """Hold one unit more for an owner until the block ends. Raises TooManyRequests as `acquire` does."""
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
