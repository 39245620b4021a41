"""One log line per finished request. The prompt is never logged."""

import logging

from server.queue.jobs import Job, Outcome

log = logging.getLogger(__name__)


def log_finished(job: Job, outcome: Outcome, *, is_cancelled: bool) -> None:
    """Log how a request ended, with the first 9 characters of the owner's id."""
    how = "cancelled" if is_cancelled else "completed" if outcome.status == 200 else f"failed, {outcome.error}"
    seconds = f" in {outcome.inference_time:.2f} s" if outcome.inference_time else ""
    about = {"request_id": job.request_id, "endpoint": job.endpoint, "owner": job.owner[:9], "status": outcome.status}
    details = {
        "seconds": outcome.inference_time,
        **outcome.provenance,
        "billable_units": outcome.billable_units or None,
        "error_type": outcome.error_type,
        "attempt": job.attempt if job.attempt > 1 else None,
    }
    extra = {name: value for name, value in details.items() if value is not None}
    log.info("%s %s%s", job.endpoint, how, seconds, extra={**about, **extra})
