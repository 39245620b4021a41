"""Rules for a job whose process ended before the job did: retry or fail."""

from server.errors import ClientCancelled, ClientDisconnected, InternalError, ServerError
from server.queue.jobs import Job, Mode, Outcome

#: fal's limit on the attempts of a job whose process ends each time.
MAX_ATTEMPTS = 10
#: After this many crashes of the process that ran it, a job counts as the cause and fails, so that other jobs can run.
MAX_CRASHES = 3


def retry_or_fail(job: Job) -> Outcome | None:
    """Return how the job ends if it is damaged, crashed too often or was tried too often; None if it may be retried."""
    if job.is_damaged:
        message = "The stored request is damaged, so its input files cannot be found; submit it again."
        return Outcome.from_error(InternalError(message))
    if job.crash_count >= MAX_CRASHES:
        return Outcome.from_error(
            InternalError(f"The server crashed {job.crash_count} times while it ran this request.")
        )
    if job.attempt >= MAX_ATTEMPTS:
        return Outcome.from_error(
            InternalError(
                f"Gave up after {job.attempt} attempts: the server's process ended each time; submit the request again."
            )
        )
    return None


def cancellation_error(job: Job) -> ServerError:
    """Return the error of a cancelled job: ClientCancelled for a queue job, otherwise ClientDisconnected."""
    return ClientCancelled() if job.mode == Mode.QUEUE else ClientDisconnected()
