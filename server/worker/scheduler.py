"""Who takes the next step: least remaining work, fair between keys."""

from collections.abc import Sequence

from server.queue.jobs import Priority
from server.worker.running_job import RunningJob

#: A request that waits is counted as shorter by one part in so many of the work done since it was claimed.
AGEING = 20


class FairScheduler:
    """Counts the work done for each key, in floating point operations.

    Within a key, the request with the least remaining work goes first: equal requests end one after the other, and a
    short one goes before a long one that has more left to do. Ageing bounds what the long one waits: with R work
    remaining, it is overtaken only by requests of r work that are claimed before AGEING * (R - r) was done after it.

    Between keys, the lowest score goes first: the work done for the key, plus what remains of its next request. That
    is the virtual finish of fair queueing. As a request advances, the sum stays the same, so equal keys alternate
    request by request. Counted in integers, because in floats the sum would drift.
    """

    def __init__(self) -> None:
        self._done: dict[Priority, dict[str, int]] = {priority: {} for priority in Priority}
        self.total = 0

    def add(self, running: RunningJob, others: Sequence[RunningJob]) -> None:
        """A request begins. Its key gets no credit for the time in which it asked for nothing."""
        running.claimed_at = self.total
        # Each priority for itself: what normal ones are given, low ones were never to have.
        priority, done = running.job.priority, self._done[running.job.priority]
        active = {other.job.owner for other in others if other.job.priority == priority}
        least = min((done[owner] for owner in active), default=None)
        # Keys that have fallen behind start level with the others; those that are ahead stay so.
        kept = {} if least is None else {key: work for key, work in done.items() if key in active or work > least}
        kept.setdefault(running.job.owner, least or 0)
        self._done[priority] = kept

    def charge(self, running: RunningJob, work: int) -> None:
        """So much was done for it."""
        self._done[running.job.priority][running.job.owner] += work
        self.total += work

    def in_turn(self, running: Sequence[RunningJob]) -> list[RunningJob]:
        """All of them, in the order of their turns: the cancelled, then normal priority before low.

        Of one priority: those whose pictures wait to be decoded, then by score, then by what remains.
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
            # Of equal scores the one that has begun: turn by turn, both would end late.
            return (*group, score, remaining, first.job.sequence, *self._aged(each))

        return sorted(running, key=turn)

    def _aged(self, running: RunningJob) -> tuple[int, int]:
        """The order within a key."""
        age = (self.total - running.claimed_at) // AGEING
        return running.task.remaining_work - age, running.job.sequence
