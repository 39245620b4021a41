"""A request as a test sees it: what the application sent, and what became of it."""

from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from server.queue.jobs import Job, Submission


@dataclass(frozen=True)
class RecordedRequest:
    """A request that passed validation. If the queue refused it, `job` is None, and `refused` is the HTTP status."""

    submission: Submission
    submitted_at: float
    job: Job | None = None
    refused: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Build the JSON object of this request, with its present status."""
        job, submission = self.job, self.submission
        return {
            "request_id": job.request_id if job else None,
            "endpoint": submission.endpoint,
            "mode": submission.mode,
            "input": from_json(submission.input),
            "priority": submission.priority,
            "webhook_url": submission.webhook_url,
            "idempotency_key": submission.idempotency_key,
            "submitted_at": self.submitted_at,
            "status": job.state if job else "REFUSED",
            "refused": self.refused,
            "is_cancelled": bool(job and job.is_cancelled),
            "error": job.error if job else None,
        }
