"""Rate limits per key, counted separately for requests and uploads."""

import math
import time

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from server.errors import TooManyRequests


class RateLimiter:
    """A limit on each key's requests, and separately on its uploads. A restart resets the counts."""

    def __init__(self, rate: str) -> None:
        """Parse a rate, such as "60/minute"; an empty rate means no limit."""
        self._item: RateLimitItem | None = parse(rate) if rate else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def acquire(self, owner: str, what: str = "requests") -> None:
        """Count one request, or one upload if `what` is "uploads". Raises TooManyRequests with the seconds to wait."""
        if self._item is None or self._limiter.hit(self._item, what, owner):
            return
        wait = self._limiter.get_window_stats(self._item, what, owner).reset_time - time.time()
        seconds = max(1, math.ceil(wait))
        message = f"Rate limit of {self._item} reached for {what} of this key (--rate-per-key); retry in {seconds} s"
        raise TooManyRequests(message, retry_after=seconds)
