"""A queue that makes requests fail, wait or be flagged as tests ask, and that records the requests."""

import secrets
from collections import deque
from dataclasses import dataclass
from typing import Any

from server.auth import ANONYMOUS
from server.errors import ClientCancelled, ServerError
from server.queue.jobs import Job, Outcome, Submission
from server.queue.notifier import QUEUE
from server.queue.queue import Queue
from server.testing.fault import Fault
from server.testing.recorded_request import RecordedRequest

#: How many requests are recorded, of all owners together.
_MAX_RECORDS = 10_000
_DROP_IDEMPOTENCY_KEYS = """
    UPDATE jobs SET idempotency_key = NULL WHERE idempotency_key IS NOT NULL AND (owner = ?1 OR ?1 = ?2)
"""
_DETACH_WEBHOOKS = "UPDATE jobs SET webhook_url = NULL WHERE state <> 'COMPLETED' AND (owner = ?1 OR ?1 = ?2)"
_DROP_DELIVERIES = """
    DELETE FROM deliveries WHERE due_at IS NOT NULL
    AND request_id IN (SELECT request_id FROM jobs WHERE owner = ?1 OR ?1 = ?2)
"""


@dataclass
class _Planned:
    """A fault that waits for requests. `owner` planned it, and `left` says for how many more requests."""

    fault_id: str
    owner: str
    fault: Fault
    left: int

    def is_hold(self, owner: str, fault_id: str) -> bool:
        """Return whether this is a hold of the owner, and the one with this id unless the id is empty."""
        return self.fault.hold and _concerns(owner, self.owner) and fault_id in ("", self.fault_id)


def _concerns(owner: str, other: str) -> bool:
    """Return whether what `owner` plans or asks concerns `other`. ANONYMOUS concerns every owner."""
    return owner in (ANONYMOUS, other)


class FaultQueue(Queue):
    """The queue of a server that was started for tests.

    The owner of a key plans faults for requests with this key, and sees these requests. ANONYMOUS does so for all
    requests. So parallel tests with a key each do not disturb each other, and other tests need not know the key.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take the arguments of Queue."""
        super().__init__(*args, **options)
        self._requests: deque[RecordedRequest] = deque(maxlen=_MAX_RECORDS)
        self._planned: list[_Planned] = []
        #: The faults that requests have taken, by request id.
        self._taken: dict[str, _Planned] = {}
        #: Jobs that stay IN_QUEUE. They are not in the index of waiting jobs, so the worker cannot claim them.
        self._held: dict[str, Job] = {}
        #: Jobs that stay IN_PROGRESS, by request id: the time at which each goes on, and its claim.
        self._delayed: dict[str, tuple[float, tuple[Job, str]]] = {}

    # -- for tests

    def plan(self, owner: str, fault: Fault) -> str:
        """Give the owner's next requests this fault, after those that are planned already; return the fault's id."""
        planned = _Planned(secrets.token_hex(8), owner, fault, fault.times)
        with self._lock:
            self._planned.append(planned)
        return planned.fault_id

    def requests(self, owner: str) -> list[dict[str, Any]]:
        """Return the owner's requests in their order, as JSON objects with their present status."""
        with self._lock:
            return [request.to_dict() for request in self._requests if _concerns(owner, request.submission.owner)]

    def release_held(self, owner: str, fault_id: str = "") -> int:
        """End all holds of the owner, or the one with this id; return how many requests they held.

        A hold that no request has taken yet ends too.
        """
        with self._lock:
            self._planned = [each for each in self._planned if not each.is_hold(owner, fault_id)]
            released = [job for name, job in self._held.items() if self._taken[name].is_hold(owner, fault_id)]
            for job in released:
                del self._held[job.request_id]
                self._waiting.add_waiting(job)
        self._notifier.notify(QUEUE, *(job.request_id for job in released))
        self._notifier.work_available.set()
        return len(released)

    def reset(self, owner: str) -> None:
        """Delete the owner's faults and records, cancel its unfinished requests, and send none of its webhooks.

        An Idempotency-Key that was used before is new again.
        """
        with self._lock:
            self._planned = [each for each in self._planned if not _concerns(owner, each.owner)]
            with self._database.transaction() as connection:
                for statement in (_DROP_IDEMPOTENCY_KEYS, _DETACH_WEBHOOKS, _DROP_DELIVERIES):
                    connection.execute(statement, (owner, ANONYMOUS))
            for job in [job for job in self._live.values() if _concerns(owner, job.owner)]:
                self.cancel(job)
            kept = [request for request in self._requests if not _concerns(owner, request.submission.owner)]
            self._requests = deque(kept, maxlen=_MAX_RECORDS)
            self._taken = {name: each for name, each in self._taken.items() if not _concerns(owner, each.owner)}

    def webhook_copies(self, request_id: str) -> int:
        """Return how often the webhook of a request is sent at its first attempt."""
        planned = self._taken.get(request_id)
        return planned.fault.webhook_copies if planned else 1

    # -- what differs from Queue

    def submit(self, submission: Submission) -> Job:
        """Submit a request, which takes the next fault planned for it. Also raises the error of that fault."""
        # Under the lock, the worker cannot claim the job before the job has its fault.
        with self._lock:
            planned, now, num_live = self._next_for(submission), self._clock(), len(self._live)
            try:
                if planned and planned.fault.refuses:
                    self._use(planned)
                    raise planned.fault.error()
                job = super().submit(submission)
            except ServerError as error:
                self._requests.append(RecordedRequest(submission, now, refused=error.status))
                raise
            # A repeated Idempotency-Key returns an earlier job, which takes no fault and may have ended.
            is_new = len(self._live) > num_live
            self._requests.append(RecordedRequest(submission, now, job))
            if is_new:
                # Images of a few steps are noise, which the safety checker may flag without a reason.
                job.verdict = False
            if is_new and planned:
                self._use(planned)
                self._apply(planned, job)
        return job

    def claim(self, *, include_low_priority: bool = True, slots: int = 1) -> tuple[Job, str] | None:
        """Claim the next job that has neither a delay nor a failure ahead; start the delays, and end what must fail."""
        with self._lock:
            while claimed := self._pop_due():
                if not self._is_failed(claimed[0]):
                    return claimed
            while claimed := super().claim(include_low_priority=include_low_priority, slots=slots):
                job = claimed[0]
                if delay := self._fault(job).delay:
                    self._delayed[job.request_id] = self._clock() + delay, claimed
                elif not self._is_failed(job):
                    return claimed
        return None

    def position(self, job: Job) -> int:
        """Return how many waiting jobs are ahead of this one. For a held job, return the position that the test set."""
        planned = self._taken.get(job.request_id)
        if planned and planned.fault.queue_position is not None and job.request_id in self._held:
            return planned.fault.queue_position
        return super().position(job)

    def fail_expired(self) -> int:
        """Fail the waiting jobs whose start deadline has passed. Wake the worker if a delay is over."""
        with self._lock:
            if any(due <= self._clock() for due, _ in self._delayed.values()):
                self._notifier.work_available.set()
        return super().fail_expired()

    def _complete(self, job: Job, outcome: Outcome, *, is_cancelled: bool = False) -> None:
        super()._complete(job, outcome, is_cancelled=is_cancelled)
        self._held.pop(job.request_id, None)

    # -- internals

    def _next_for(self, submission: Submission) -> _Planned | None:
        for planned in self._planned:
            if _concerns(planned.owner, submission.owner) and planned.fault.endpoint in ("", submission.endpoint):
                return planned
        return None

    def _use(self, planned: _Planned) -> None:
        planned.left -= 1
        if planned.left == 0:
            self._planned.remove(planned)

    def _apply(self, planned: _Planned, job: Job) -> None:
        self._taken[job.request_id] = planned
        job.verdict, job.webhook_delay = planned.fault.flag, planned.fault.webhook_delay
        if planned.fault.hold:
            self._held[job.request_id] = job
            self._waiting.remove_waiting(job)

    def _fault(self, job: Job) -> Fault:
        planned = self._taken.get(job.request_id)
        return planned.fault if planned else _NO_FAULT

    def _pop_due(self) -> tuple[Job, str] | None:
        """Return the claim of a delayed job that goes on now, because its delay is over or because it was cancelled."""
        for name, (due, claimed) in self._delayed.items():
            if due <= self._clock() or claimed[0].is_cancelled:
                del self._delayed[name]
                return claimed
        return None

    def _is_failed(self, job: Job) -> bool:
        """End a running job as its fault says; return whether there was such a fault."""
        fault = self._fault(job)
        if fault.status is None or job.is_cancelled:
            return False
        self._complete(job, Outcome.from_error(fault.error()), is_cancelled=fault.status == ClientCancelled.status)
        return True


_NO_FAULT = Fault.model_construct()
