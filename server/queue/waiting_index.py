"""Waiting jobs in queue order, and the number of waiting and running jobs per owner, kept in memory."""

import threading
from collections import Counter
from collections.abc import Collection

from sortedcontainers import SortedList

from server.queue.jobs import Job, Priority


class WaitingIndex:
    """An index of waiting jobs. Its lock is never held during a commit, so the event loop can always read positions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranks: SortedList[int] = SortedList()
        self._jobs: dict[int, Job] = {}
        #: The ranks of each owner's waiting requests.
        self._waiting: dict[Priority, dict[str, SortedList[int]]] = {priority: {} for priority in Priority}
        self._running: dict[Priority, Counter[str]] = {priority: Counter() for priority in Priority}

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return len(self._ranks)

    def add_waiting(self, job: Job) -> None:
        """Add a waiting job at the place that its rank gives."""
        with self._lock:
            self._ranks.add(job.rank)
            self._jobs[job.rank] = job
            self._waiting[job.priority].setdefault(job.owner, SortedList()).add(job.rank)

    def remove_waiting(self, job: Job) -> None:
        """Remove a job that no longer waits; do nothing if it is not in the index."""
        with self._lock:
            if self._jobs.pop(job.rank, None) is None:
                return
            self._ranks.remove(job.rank)
            own = self._waiting[job.priority][job.owner]
            own.remove(job.rank)
            if not own:
                del self._waiting[job.priority][job.owner]

    def start(self, job: Job) -> None:
        """Remove a waiting job and count it as running."""
        self.remove_waiting(job)
        with self._lock:
            self._running[job.priority][job.owner] += 1

    def finish(self, job: Job) -> None:
        """Stop counting a running job."""
        with self._lock:
            running = self._running[job.priority]
            running[job.owner] -= 1
            if running[job.owner] <= 0:
                del running[job.owner]

    def position(self, job: Job) -> int:
        """Return how many jobs are ahead of this one."""
        with self._lock:
            return self._ranks.bisect_left(job.rank)

    def num_waiting(self, owner: str) -> int:
        """Return how many requests of this owner wait."""
        with self._lock:
            return sum(len(owners.get(owner, ())) for owners in self._waiting.values())

    def owners_at_limit(self, limit: int) -> set[str]:
        """Return the owners with `limit` or more running requests; a limit of 0 means no limit."""
        with self._lock:
            running: Counter[str] = sum(self._running.values(), Counter())
            return {owner for owner, number in running.items() if 0 < limit <= number}

    def first(self, priority: Priority, excluded_owners: Collection[str], slots: int) -> Job | None:
        """Return the next job of this priority that does not belong to `excluded_owners`; None if there is none.

        Jobs come in queue order, with one exception: an owner that already runs an equal share of `slots` is skipped
        while an owner below its share waits. Otherwise an owner with a hundred queued requests would delay the first
        request of every other owner.
        """
        with self._lock:
            waiting = {owner: own[0] for owner, own in self._waiting[priority].items() if owner not in excluded_owners}
            running = self._running[priority]
            share = slots / (len(waiting.keys() | running.keys()) or 1)
            behind = [rank for owner, rank in waiting.items() if running[owner] < share]
            rank = min(behind or waiting.values(), default=None)
            return None if rank is None else self._jobs[rank]
