"""The order of steps: least remaining work first, fair between keys."""

from collections.abc import Sequence

from server.queue.jobs import Priority
from server.worker.running_job import RunningJob

#: Ageing: a waiting request counts as shorter by 1/AGEING of all the work done since it was claimed.
AGEING = 20


class FairScheduler:
    """A fair queue over keys, which counts the work done for each key in floating point operations.

    Within a key, the request with the least remaining work goes first. Equal requests finish one after the other, and
    a short request goes before a long one that has more left to do. Ageing bounds how long the long one waits: with R
    work remaining, it is overtaken only by requests of r work claimed before AGEING * (R - r) work was done after its
    own claim.

    Between keys, the lowest score goes first: the work done for the key, plus the remaining work of its next request.
    This score is the virtual finish time of fair queueing. It stays the same while a request advances, so equal keys
    alternate request by request. Work is counted in integers, because a sum of floats would drift.
    """

    def __init__(self) -> None:
        self._done: dict[Priority, dict[str, int]] = {priority: {} for priority in Priority}
        self.total = 0

    def add(self, running: RunningJob, others: Sequence[RunningJob]) -> None:
        """Add a request that starts. Its key gets no credit for the time it was idle."""
        running.claimed_at = self.total
        # Priorities are counted separately, because low priority has no claim to the work done for normal.
        priority, done = running.job.priority, self._done[running.job.priority]
        active = {other.job.owner for other in others if other.job.priority == priority}
        least = min((done[owner] for owner in active), default=None)
        # Idle keys that have fallen behind start level with the others. Keys that are ahead stay ahead.
        remembered = {} if least is None else {key: work for key, work in done.items() if key in active or work > least}
        remembered.setdefault(running.job.owner, least or 0)
        self._done[priority] = remembered

    def charge(self, running: RunningJob, work: int) -> None:
        """Add work that was done for a request."""
        self._done[running.job.priority][running.job.owner] += work
        self.total += work

    def in_turn(self, running: Sequence[RunningJob]) -> list[RunningJob]:
        """Sort requests by turn: cancelled ones first, then normal priority before low.

        Within a priority: requests waiting to decode, then by score, then by remaining work.
        """
        firsts: dict[tuple[Priority, str], RunningJob] = {}
        for each in filter(lambda each: not each.steps_done, running):
            key = (each.job.priority, each.job.owner)
            firsts[key] = min(firsts.get(key, each), each, key=self._aged)

        def turn(each: RunningJob) -> tuple[int, ...]:
            job, is_waiting = each.job, not each.steps_done
            group = (not job.is_cancelled, job.priority == Priority.LOW, is_waiting)
            if not is_waiting:
                return (*group, job.sequence)
            first = firsts[job.priority, job.owner]
            remaining = first.task.remaining_work
            score = self._done[job.priority][job.owner] + remaining
            # With equal scores, the request that has started goes first: if they alternated, both would finish late.
            return (*group, score, remaining, first.job.sequence, *self._aged(each))

        return sorted(running, key=turn)

    def _aged(self, running: RunningJob) -> tuple[int, int]:
        """Return the sort key within an owner's requests: remaining work less ageing."""
        age = (self.total - running.claimed_at) // AGEING
        return running.task.remaining_work - age, running.job.sequence
