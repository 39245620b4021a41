"""Response bodies: submit, status, result, errors, events, and the URLs of a request."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.middleware.request_id import HEADER
from server.errors import HEADERS_BY_TYPE, ServerError
from server.queue.jobs import Job, Outcome, State

#: fal responds with 202 while a request is pending and 200 when it is done; `fal.apps` relies on the code alone.
STATUS_CODES = {State.IN_QUEUE: 202, State.IN_PROGRESS: 202, State.COMPLETED: 200}


_CHUNK = 2**16


class FalJSONResponse(Response):
    """A JSON response with NaN as null. The JavaScript SDKs parse it only if its type is application/json."""

    media_type = "application/json"
    #: The memory reservation of a response that may be large, held until the response is sent.
    room: AbstractAsyncContextManager[object, bool | None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response in parts, then release its memory reservation."""
        if self.room is None:
            await super().__call__(scope, receive, send)
            return
        async with self.room:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            # Send in parts: uvicorn buffers each part whole, and waits for the client before it accepts the next.
            for start in range(0, len(self.body), _CHUNK):
                part = self.body[start : start + _CHUNK]
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body"})

    def render(self, content: object) -> bytes:
        """Serialize the content; bytes are JSON already and pass through."""
        return content if isinstance(content, bytes) else to_json(content, inf_nan_mode="null")


def urls(job: Job) -> dict[str, str]:
    """Build a request's three URLs: absolute, and under the two-segment id as at fal."""
    app = "/".join(job.endpoint.split("/")[:2])
    # A host named `queue.*` implies the queue. With other hosts, the path says so: some clients rebuild URLs from it.
    host = job.base_url.split("://", 1)[-1]
    prefix = "" if host.startswith("queue.") else "/queue"
    url = f"{job.base_url}{prefix}/{app}/requests/{job.request_id}"
    return {"response_url": url, "status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}


def submit_body(job: Job, position: int) -> dict[str, Any]:
    """Build the response to a submit, with the fields that any SDK reads."""
    return {
        "status": State.IN_QUEUE,
        "request_id": job.request_id,
        **urls(job),
        "queue_position": position,
        "logs": None,
        "metrics": {},
    }


def status_body(job: Job, position: int, logs: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """Build a status object. `logs` is None unless the client requested logs; then a list, even if empty."""
    body: dict[str, Any] = {
        "status": job.state,
        "request_id": job.request_id,
        **urls(job),
        "logs": logs,
        "metrics": {},
    }
    if job.state == State.IN_QUEUE:
        body["queue_position"] = position
    if job.state == State.COMPLETED:
        if job.inference_time is not None:
            body["metrics"]["inference_time"] = job.inference_time
        if job.acceleration is not None:
            body["metrics"]["acceleration"] = job.acceleration
        if job.error is not None:
            body["error"] = job.error
        if job.error_type is not None:
            body["error_type"] = job.error_type
    return body


def progress_event(job: Job) -> dict[str, Any]:
    """Build a progress event of /stream."""
    body: dict[str, Any] = {"type": "progress", "step": job.step, "num_inference_steps": job.num_steps}
    return body if job.preview is None else {**body, "preview": job.preview}


def result_response(outcome: Outcome) -> FalJSONResponse:
    """Build the response of a finished job, with its stored status and headers."""
    headers = dict(HEADERS_BY_TYPE.get(outcome.error_type or "", {}))
    if outcome.error_type:
        headers["x-fal-error-type"] = outcome.error_type
    if outcome.status >= 500:
        headers["x-fal-retryable"] = "true"
    headers.setdefault("x-fal-billable-units", str(outcome.billable_units))
    return FalJSONResponse(outcome.body.encode(), outcome.status, headers)


def error_response(problem: ServerError) -> Response:
    """Build an error response in fal's shape."""
    headers = dict(problem.headers)
    if problem.error_type:
        headers["x-fal-error-type"] = problem.error_type
    return FalJSONResponse(problem.body, problem.status, headers)


def with_request_id(response: Response, job: Job) -> Response:
    """Add the header with the job's request id to a response."""
    response.headers[HEADER] = job.request_id
    return response
