"""What becomes of a job whose process is gone before it was done."""

from server.errors import ClientCancelled, ClientDisconnected, InternalError, ServerError
from server.queue.jobs import Job, Mode, Outcome

#: fal retries a job whose runner was lost at most this often.
MAX_ATTEMPTS = 10
#: After so many it is taken to be the job's fault, and others get their turn.
MAX_CRASHES = 3


def outcome_after_loss(job: Job) -> Outcome | None:
    """How it ends, because it was tried too often or cannot be read; None when it may be tried again."""
    if job.is_damaged:
        message = "The row of this request is damaged, so that the files which it brought along cannot be found."
        return Outcome.from_error(InternalError(message))
    if job.crash_count >= MAX_CRASHES:
        return Outcome.from_error(
            InternalError(f"The server had to end {job.crash_count} times while it worked at this request.")
        )
    if job.attempt >= MAX_ATTEMPTS:
        return Outcome.from_error(InternalError(f"Gave up after {job.attempt} attempts."))
    return None


def cancellation_error(job: Job) -> ServerError:
    """What the client of a cancelled job is told: it asked for that, or it left."""
    return ClientCancelled() if job.mode == Mode.QUEUE else ClientDisconnected()
