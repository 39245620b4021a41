"""How many requests a key may send in a while, and how many uploads beside them."""

import math
import time

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from server.errors import TooManyRequests


class RateLimiter:
    """Counted in this process's memory, so that it begins anew with it. Every door counts."""

    def __init__(self, rate: str) -> None:
        """`rate` is such as "60/minute"; without one, there is no limit."""
        self._item: RateLimitItem | None = parse(rate) if rate else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def acquire(self, owner: str, what: str = "requests") -> None:
        """Count one of these. Raises TooManyRequests, which says when the next one is welcome."""
        if self._item is None or self._limiter.hit(self._item, what, owner):
            return
        wait = self._limiter.get_window_stats(self._item, what, owner).reset_time - time.time()
        message = f"This key may send {self._item}: that many {what} (--rate-per-key)"
        raise TooManyRequests(message, retry_after=max(1, math.ceil(wait)))
