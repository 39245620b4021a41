"""Who waits, in the queue's order, and how many requests of each owner wait and run: the image of the rows."""

import threading
from collections import Counter
from collections.abc import Collection

from sortedcontainers import SortedList

from server.queue.jobs import Job, Priority


class WaitingIndex:
    """Held for moments only, so the event loop can ask for positions while a commit waits for the disk."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranks: SortedList[int] = SortedList()
        self._jobs: dict[int, Job] = {}
        #: The ranks of each owner's waiting requests.
        self._waiting: dict[Priority, dict[str, SortedList[int]]] = {priority: {} for priority in Priority}
        self._running: dict[Priority, Counter[str]] = {priority: Counter() for priority in Priority}

    def __len__(self) -> int:
        """How many wait."""
        return len(self._ranks)

    def add_waiting(self, job: Job) -> None:
        """It takes its place."""
        with self._lock:
            self._ranks.add(job.rank)
            self._jobs[job.rank] = job
            self._waiting[job.priority].setdefault(job.owner, SortedList()).add(job.rank)

    def remove_waiting(self, job: Job) -> None:
        """It waits no more."""
        with self._lock:
            if self._jobs.pop(job.rank, None) is None:
                return
            self._ranks.remove(job.rank)
            own = self._waiting[job.priority][job.owner]
            own.remove(job.rank)
            if not own:
                del self._waiting[job.priority][job.owner]

    def start(self, job: Job) -> None:
        """It waits no more and runs."""
        self.remove_waiting(job)
        with self._lock:
            self._running[job.priority][job.owner] += 1

    def finish(self, job: Job) -> None:
        """It runs no more."""
        with self._lock:
            running = self._running[job.priority]
            running[job.owner] -= 1
            if running[job.owner] <= 0:
                del running[job.owner]

    def position(self, job: Job) -> int:
        """How many are ahead of it."""
        with self._lock:
            return self._ranks.bisect_left(job.rank)

    def num_waiting(self, owner: str) -> int:
        """How many requests of this owner wait."""
        with self._lock:
            return sum(len(owners.get(owner, ())) for owners in self._waiting.values())

    def owners_at_limit(self, limit: int) -> set[str]:
        """The owners of whom so many run, or more; 0 is no limit."""
        with self._lock:
            running: Counter[str] = sum(self._running.values(), Counter())
            return {owner for owner, number in running.items() if 0 < limit <= number}

    def first(self, priority: Priority, excluded_owners: Collection[str], slots: int) -> Job | None:
        """The next of this priority, in the queue's order, with one exception; None when none waits.

        An owner who has a full share of the slots is passed over while one without waits: else whoever has a
        hundred requests in the queue would hold up everybody's first. Owners who are `busy` are always passed over.
        """
        with self._lock:
            waiting = {owner: own[0] for owner, own in self._waiting[priority].items() if owner not in excluded_owners}
            running = self._running[priority]
            share = slots / (len(waiting.keys() | running.keys()) or 1)
            behind = [rank for owner, rank in waiting.items() if running[owner] < share]
            rank = min(behind or waiting.values(), default=None)
            return None if rank is None else self._jobs[rank]
