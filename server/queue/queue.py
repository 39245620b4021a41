"""The durable queue. A job's row is authoritative. Status requests read a copy in memory, updated after each commit."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from server.errors import (
    ClientCancelled,
    ClientDisconnected,
    DiskFull,
    NotFound,
    QueueFull,
    StartTimeout,
    TooManyRequests,
)
from server.metrics import Metrics
from server.queue import job_table, jobs, request_log, retry
from server.queue.jobs import Job, Mode, Outcome, Priority, State, Submission
from server.queue.notifier import QUEUE, WEBHOOKS, Notifier
from server.queue.pending_storage import PendingStorage
from server.queue.waiting_index import WaitingIndex
from server.storage.database import Database

log = logging.getLogger(__name__)

#: How many finished jobs stay in memory to serve status requests.
RECENT = 2048


class Queue:
    """The queue: submit, claim, progress, finish, cancel. Every method may be called from any thread.

    Methods that read or change rows wait for the disk: do not call them on the event loop.
    """

    def __init__(
        self,
        database: Database,
        notifier: Notifier,
        max_length: int = 100_000,
        clock: Callable[[], float] = time.time,
        metrics: Metrics | None = None,
        *,
        max_length_per_owner: int = 0,
        max_running_per_owner: int = 0,
        pending_storage: PendingStorage | None = None,
    ) -> None:
        """Start empty. A per-owner limit of 0 means no limit. `pending_storage` counts each unfinished request."""
        self._database = database
        self._metrics = metrics or Metrics()
        self._notifier = notifier
        self._max_length, self._max_length_per_owner = max_length, max_length_per_owner
        self._max_running_per_owner = max_running_per_owner
        self._clock = clock
        # Held during each commit and its in-memory change, so that these changes happen in the order of the commits.
        self._lock = threading.RLock()
        #: Called when a running job is cancelled. In a cluster, waits until the job's runner confirms, with a timeout.
        self.on_cancel: Callable[[Job], None] = lambda job: None
        self._waiting = WaitingIndex()
        self._pending_storage = pending_storage or PendingStorage(lambda name: 0)
        self._live: dict[str, Job] = {}
        self._recent: OrderedDict[str, Job] = OrderedDict()

    # -- for clients

    def submit(self, submission: Submission) -> Job:
        """Add a job, or return the earlier one with the same Idempotency-Key. The returned job survives a crash.

        Raises QueueFull, TooManyRequests, InvalidInput for an Idempotency-Key used with another body, and DiskFull.
        """
        with self._lock:
            with self._database.transaction() as connection:
                if row := job_table.find_by_idempotency_key(connection, submission):
                    return self.get_cached(row["request_id"]) or job_table.job_from_row(row)
                if len(self._waiting) >= min(self._max_length, submission.max_queue_length or self._max_length):
                    raise QueueFull
                if 0 < self._max_length_per_owner <= self._waiting.num_waiting(submission.owner):
                    raise TooManyRequests(
                        f"Queue limit reached: this key already has {self._max_length_per_owner} waiting requests,"
                        " the most that --max-queue-length-per-key allows; try again when one has started"
                    )
                job = job_table.insert(connection, submission, self._clock())
            self._live[job.request_id] = job
            self._pending_storage.add(job)
            self._waiting.add_waiting(job)
        self._metrics.submitted.labels(job.endpoint).inc()
        self._notifier.work_available.set()
        return job

    def cancel(self, job: Job) -> State:
        """Cancel a job because its client cancelled it or disconnected; return the job's previous state.

        A waiting job ends now, and a running job before its next step. A completed job stays as it is.
        """
        with self._lock:
            state = job.state
            if state == State.IN_QUEUE:
                self._complete(job, Outcome.from_error(retry.cancellation_error(job)), is_cancelled=True)
            elif state == State.IN_PROGRESS and not job.is_cancelled:
                with self._database.transaction() as connection:
                    job_table.mark_cancelled(connection, job)
                job.is_cancelled = True
        if job.state == State.IN_PROGRESS:
            self.on_cancel(job)
        self._notifier.work_available.set()
        return state

    def get_cached(self, request_id: str) -> Job | None:
        """Return an unfinished or recent job from memory, without reading the disk; None if it is not in memory."""
        return self._live.get(request_id) or self._recent.get(request_id)

    def get(self, request_id: str) -> Job | None:
        """Return a job, read from its row when it is not in memory; None if there is no such job."""
        if job := self.get_cached(request_id):
            return job
        rows = self._database.read("SELECT * FROM jobs WHERE request_id = ?", request_id)
        return job_table.job_from_row(rows[0]) if rows else None

    def result(self, job: Job) -> Outcome:
        """Return how a completed job ended. Raises NotFound when the job was deleted meanwhile.

        For a job with `store_io` False, record in the row when its result was first fetched.
        """
        rows = self._database.read("SELECT * FROM jobs WHERE request_id = ?", job.request_id)
        if not rows:
            raise NotFound
        row = rows[0]
        if not job.store_io and row["fetched_at"] is None:
            try:
                with self._database.transaction() as connection:
                    job_table.mark_fetched(connection, job, self._clock())
            except DiskFull:
                # The client still gets the result; only the record of the fetch is missing.
                log.warning(
                    "the disk is full or broken: cannot record that this result was fetched; the next fetch retries",
                    extra={"request_id": job.request_id},
                )
        return job_table.outcome_from_row(row)

    def position(self, job: Job) -> int:
        """Return how many waiting jobs are ahead of this one."""
        return self._waiting.position(job)

    @property
    def length(self) -> int:
        """The number of waiting jobs."""
        return len(self._waiting)

    # -- for the worker

    def claim(self, *, include_low_priority: bool = True, slots: int = 1) -> tuple[Job, str] | None:
        """Claim the next job: set it IN_PROGRESS, count the attempt, and return it with its input as JSON.

        Returns None when no waiting job may start. `JobSource.claim` explains the arguments.
        """
        with self._lock:
            job = self._next_job(include_low_priority=include_low_priority, slots=slots)
            if job is None:
                return None
            with self._database.transaction() as connection:
                row = job_table.claim(connection, job, self._clock())
            job.attempt, job.state = row["attempt"], State.IN_PROGRESS
            self._waiting.start(job)
        self._metrics.observe_start(job.endpoint, job.attempt, self._clock() - row["submitted_at"])
        self._notifier.notify(job.request_id, QUEUE)
        return job, row["input"]

    def progress(self, job: Job, step: int, num_steps: int) -> None:
        """Record a completed step in memory and in the job's log, and notify listeners."""
        job.step, job.num_steps = step, num_steps
        self.log(job, f"step {step}/{num_steps}")

    def log(self, job: Job, message: str, level: str = "INFO") -> None:
        """Add one line to the job's log, and notify listeners."""
        timestamp = datetime.fromtimestamp(self._clock(), UTC).isoformat()
        job.logs.append(jobs.log_line(message, level, timestamp))
        self._notifier.notify(job.request_id)

    def finish(self, job: Job, outcome: Outcome) -> bool:
        """Finish a running job with this outcome; return True. Finish a cancelled job as cancelled; return False."""
        with self._lock:
            if job.is_cancelled:
                self._complete(job, Outcome.from_error(retry.cancellation_error(job)), is_cancelled=True)
                return False
            self._complete(job, outcome)
            return True

    def record_crash(self, crashed_jobs: Sequence[Job]) -> None:
        """Count a crash for each of these jobs that still runs, because a fault ends the process that runs them."""
        try:
            self._count_crash(crashed_jobs)
        except DiskFull:
            # Do not raise the error, because the caller must report the fault itself.
            log.error("the disk is full or broken: cannot record which jobs ran when the process crashed")

    def release(self, job: Job) -> None:
        """Put a running job back at its old place in the queue, because this process will not finish it.

        A cancelled job is finished as cancelled instead.
        """
        with self._lock:
            if job.is_cancelled:
                self._complete(job, Outcome.from_error(retry.cancellation_error(job)), is_cancelled=True)
                return
            with self._database.transaction() as connection:
                job_table.release(connection, job)
            job.step, job.num_steps, job.preview, job.logs = 0, 0, None, []
            job.state = State.IN_QUEUE
            self._waiting.finish(job)
            self._waiting.add_waiting(job)
        self._notifier.notify(job.request_id, QUEUE)

    def requeue_or_fail(self, job: Job) -> None:
        """Release a job whose process is gone, or fail it if `retry.retry_or_fail` says so."""
        with self._lock:
            outcome = retry.retry_or_fail(job)
            if outcome and not job.is_cancelled:
                self._complete(job, outcome)
            else:
                self.release(job)
        self._notifier.work_available.set()

    # -- recovery and expiry

    def record_crash_at_startup(self, request_ids: Sequence[str]) -> None:
        """Count a crash for each job that ran when the last process crashed. Call at startup, before `recover`.

        Raises DiskFull. The crash can then be counted at the next start.
        """
        self._count_crash([job for request_id in request_ids if (job := self.get(request_id))])

    def recover(self) -> int:
        """Load unfinished jobs at startup, and requeue those that were running. Returns how many jobs wait.

        A job ends here if it is not a queue job, if it was cancelled or is damaged, or after too many crashes or tries.
        """
        with self._lock:
            for row in self._database.read("SELECT * FROM jobs WHERE state <> 'COMPLETED' ORDER BY sequence"):
                job = job_table.job_from_row(row)
                self._live[job.request_id] = job
                self._pending_storage.add(job)
                if job.mode != Mode.QUEUE:
                    self._complete(job, Outcome.from_error(ClientDisconnected()))
                elif job.is_cancelled:
                    self._complete(job, Outcome.from_error(ClientCancelled()), is_cancelled=True)
                elif job.state == State.IN_PROGRESS or job.crash_count >= retry.MAX_CRASHES or job.is_damaged:
                    self.requeue_or_fail(job)
                else:
                    self._waiting.add_waiting(job)
        self._notifier.work_available.set()
        if self.length:
            log.info("%d requests are waiting", self.length)
        return self.length

    def fail_expired(self) -> int:
        """Fail the waiting jobs whose start deadline has passed; return their number."""
        with self._lock:
            late = self._database.read(
                "SELECT request_id FROM jobs WHERE state = 'IN_QUEUE' AND start_deadline <= ?", self._clock()
            )
            for (request_id,) in late:
                self._complete(self._live[request_id], Outcome.from_error(StartTimeout()))
        return len(late)

    def evict(self, request_ids: list[str]) -> None:
        """Remove finished jobs from memory, after their rows are deleted."""
        with self._lock:
            for request_id in request_ids:
                self._recent.pop(request_id, None)

    # -- internals

    def _next_job(self, *, include_low_priority: bool, slots: int) -> Job | None:
        """Return the next job to claim, or None; fail the jobs before it whose start deadline has passed."""
        busy = self._waiting.owners_at_limit(self._max_running_per_owner)
        for priority in (Priority.NORMAL, Priority.LOW) if include_low_priority else (Priority.NORMAL,):
            while job := self._waiting.first(priority, busy, slots):
                if job.start_deadline is None or job.start_deadline > self._clock():
                    return job
                self._complete(job, Outcome.from_error(StartTimeout()))
        return None

    def _count_crash(self, crashed_jobs: Sequence[Job]) -> None:
        with self._lock:
            crashed = [job for job in crashed_jobs if job.state == State.IN_PROGRESS]
            with self._database.transaction() as connection:
                for job in crashed:
                    job_table.count_crash(connection, job)
            for job in crashed:
                job.crash_count += 1

    def _complete(self, job: Job, outcome: Outcome, *, is_cancelled: bool = False) -> None:
        """Set a job COMPLETED: commit first, then update memory, then notify."""
        with self._database.transaction() as connection:
            job_table.complete(connection, job, outcome, self._clock(), is_cancelled=is_cancelled)
        if job.state == State.IN_QUEUE:
            self._waiting.remove_waiting(job)
        else:
            self._waiting.finish(job)
        job.is_cancelled, job.output_size = is_cancelled, len(outcome.body)
        job.error, job.error_type = outcome.error, outcome.error_type
        job.inference_time, job.provenance = outcome.inference_time, outcome.provenance
        # Set last, because the event loop reads without the lock: once it sees COMPLETED, all other fields are set.
        job.state = State.COMPLETED
        self._recent[job.request_id] = job
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        if self._live.pop(job.request_id, None):
            self._pending_storage.remove(job)
        self._metrics.count_end(job.endpoint, outcome.status, is_cancelled=is_cancelled)
        request_log.log_finished(job, outcome, is_cancelled=is_cancelled)
        self._notifier.notify(job.request_id, QUEUE, WEBHOOKS)
