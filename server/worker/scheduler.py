"""The order of steps: least remaining work first, fair between API keys."""

from collections.abc import Sequence

from server.queue.jobs import Priority
from server.worker.running_job import RunningJob

#: Ageing: a waiting request counts as shorter by 1/AGEING of all the work done since it was claimed.
AGEING = 20


class FairScheduler:
    """A fair queue over API keys, which counts the work done for each key in floating point operations.

    Within a key, the request with the least remaining work goes first. So equal requests finish one after the other,
    and a short request goes before a long one that has more left to do. Ageing bounds how long the long request waits:
    a request with r work remaining overtakes a request with R work remaining only if less than AGEING * (R - r) work
    was done between the claims of the two.

    Between keys, the lowest score goes first: the work done for the key, plus the remaining work of its next request.
    This score is the virtual finish time of fair queueing. It stays the same while a request advances, so equal keys
    alternate request by request. Work is counted in integers, because a sum of floats would drift.
    """

    def __init__(self) -> None:
        self._done: dict[Priority, dict[str, int]] = {priority: {} for priority in Priority}
        #: All work done so far.
        self.total = 0

    def add(self, running: RunningJob, others: Sequence[RunningJob]) -> None:
        """Add a request that starts; `others` are running. Its key gets no credit for the time without requests."""
        running.claimed_at = self.total
        # Work is counted for each priority separately: work at normal priority must not delay a key's low priority.
        priority, done = running.job.priority, self._done[running.job.priority]
        active = {other.job.owner for other in others if other.job.priority == priority}
        least = min((done[owner] for owner in active), default=None)
        # A key that was idle starts level with the active key that got the least work, unless its own count is higher.
        remembered = {} if least is None else {key: work for key, work in done.items() if key in active or work > least}
        remembered.setdefault(running.job.owner, least or 0)
        self._done[priority] = remembered

    def charge(self, running: RunningJob, work: int) -> None:
        """Count work done for a request, in floating point operations."""
        self._done[running.job.priority][running.job.owner] += work
        self.total += work

    def in_turn(self, running: Sequence[RunningJob]) -> list[RunningJob]:
        """Return requests in the order of their turns: cancelled ones, then normal priority, then low priority.

        Within a priority, requests with all steps done come first. The others follow by score, then by remaining work.
        """
        firsts: dict[tuple[Priority, str], RunningJob] = {}
        for each in filter(lambda each: not each.steps_done, running):
            key = (each.job.priority, each.job.owner)
            firsts[key] = min(firsts.get(key, each), each, key=self._aged)

        def turn(each: RunningJob) -> tuple[int, ...]:
            job, has_steps = each.job, not each.steps_done
            group = (not job.is_cancelled, job.priority == Priority.LOW, has_steps)
            if not has_steps:
                return (*group, job.sequence)
            first = firsts[job.priority, job.owner]
            remaining = first.task.remaining_work
            score = self._done[job.priority][job.owner] + remaining
            # With equal scores, the request that has started goes first: if they alternated, both would finish late.
            return (*group, score, remaining, first.job.sequence, *self._aged(each))

        return sorted(running, key=turn)

    def _aged(self, running: RunningJob) -> tuple[int, int]:
        """Return what the requests of one API key are sorted by: remaining work minus ageing, then arrival."""
        age = (self.total - running.claimed_at) // AGEING
        return running.task.remaining_work - age, running.job.sequence
