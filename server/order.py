"""Who waits, in the queue's order, and how many requests of each owner wait and run: the image of the rows."""

import threading
from collections import Counter

from sortedcontainers import SortedList

from server.jobs import BEHIND_ALL, Job


class Order:
    """Held for moments only, so the event loop can ask for positions while a commit waits for the disk."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranks: SortedList[int] = SortedList()
        self._waiting: Counter[str] = Counter()
        self._running: Counter[str] = Counter()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._ranks)

    def wait(self, job: Job) -> None:
        """It takes its place."""
        with self._lock:
            self._ranks.add(job.rank)
            self._waiting[job.owner] += 1

    def leave(self, job: Job) -> None:
        """It waits no more."""
        with self._lock:
            if job.rank in self._ranks:
                self._ranks.remove(job.rank)
                _take_one(self._waiting, job.owner)

    def run(self, job: Job) -> None:
        """It waits no more and runs."""
        self.leave(job)
        with self._lock:
            self._running[job.owner] += 1

    def rest(self, job: Job) -> None:
        """It runs no more."""
        with self._lock:
            _take_one(self._running, job.owner)

    def position(self, job: Job) -> int:
        """How many are ahead of it."""
        with self._lock:
            return self._ranks.bisect_left(job.rank)

    def waiting(self, owner: str) -> int:
        """How many requests of this owner wait."""
        return self._waiting[owner]

    def is_all_low(self) -> bool:
        """Whether those of low priority alone wait."""
        with self._lock:
            return bool(self._ranks) and self._ranks[0] > BEHIND_ALL

    def at_limit(self, limit: int) -> list[str]:
        """The owners of whom so many run, or more; 0 is no limit."""
        with self._lock:
            return [owner for owner, number in self._running.items() if 0 < limit <= number]

    def is_anybody_else_waiting(self, owners: list[str]) -> bool:
        """Whether any owner but these waits."""
        with self._lock:
            return any(owner not in owners for owner in self._waiting)


def _take_one(counter: Counter[str], owner: str) -> None:
    """One fewer; who has none is forgotten."""
    if counter[owner] > 1:
        counter[owner] -= 1
    else:
        del counter[owner]
