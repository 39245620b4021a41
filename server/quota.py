"""How many requests a key may send in a while."""

import math
import time

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from server.errors import TooManyRequests


class Quota:
    """Counted in this process's memory, so that it begins anew with it. Every door counts."""

    def __init__(self, rate: str) -> None:
        """`rate` is such as "60/minute"; without one, there is no limit."""
        self._item: RateLimitItem | None = parse(rate) if rate else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def take(self, owner: str) -> None:
        """Count one request. Raises TooManyRequests, which says when the next one is welcome."""
        if self._item is None or self._limiter.hit(self._item, owner):
            return
        wait = self._limiter.get_window_stats(self._item, owner).reset_time - time.time()
        raise TooManyRequests(f"This key may send {self._item}", retry_after=max(1, math.ceil(wait)))
