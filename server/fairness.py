"""Who takes the next step: by priority, then by the work that was done for each key and each request."""

from collections.abc import Sequence

from server.jobs import Priority
from server.running import Running


class Ledger:
    """Counts work, in floating point operations.

    The key for which least was done goes first, and of its requests the one for which least was done: a short request
    is through soon, however long the others are. Ageing keeps those from starving: each is owed a share of all the
    work done since it was claimed, so a stream of short ones cannot hold it up for ever.
    """

    def __init__(self, max_running: int) -> None:
        #: Half of an equal share.
        self._owed = 0.5 / max_running
        self._done: dict[Priority, dict[str, float]] = {priority: {} for priority in Priority}
        self.total = 0.0

    def admit(self, running: Running, others: Sequence[Running]) -> None:
        """A request begins. Its key gets no credit for the time in which it asked for nothing."""
        running.claimed_at = self.total
        # Each priority for itself: what normal ones are given, low ones were never to have.
        priority, done = running.job.priority, self._done[running.job.priority]
        active = {other.job.owner for other in others if other.job.priority == priority}
        least = min((done[owner] for owner in active), default=None)
        # Keys that have fallen behind start level with the others; those that are ahead stay so.
        kept = {} if least is None else {key: work for key, work in done.items() if key in active or work > least}
        kept.setdefault(running.job.owner, least or 0.0)
        self._done[priority] = kept

    def charge(self, running: Running, work: float) -> None:
        """So much was done for it."""
        self._done[running.job.priority][running.job.owner] += work
        self.total += work

    def urgency(self, running: Running) -> tuple[bool, bool, bool, float, float, int]:
        """Who is least goes first: the cancelled, normal priority, the painted to be seen, then as said above."""
        job = running.job
        owed = (self.total - running.claimed_at) * self._owed
        return (
            not job.is_cancelled,
            job.priority == Priority.LOW,
            not running.is_stepped,
            self._done[job.priority][job.owner],
            running.painting.work - owed,
            job.sequence,
        )
