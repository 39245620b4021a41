"""Responses and their bodies: submit, status, result, errors, events, and the URLs of a request."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.middleware.request_id import HEADER
from server.errors import HEADERS_BY_TYPE, ServerError
from server.queue.jobs import Job, Outcome, State

#: HTTP statuses of status responses. As at fal, 202 means unfinished and 200 finished. The Python module `fal.apps`
#: reads only the HTTP status, not the body.
STATUS_CODES = {State.IN_QUEUE: 202, State.IN_PROGRESS: 202, State.COMPLETED: 200}
#: The size in bytes of the parts in which a large response is sent.
_CHUNK = 2**16


class FalJSONResponse(Response):
    """A JSON response; NaN becomes null. The JavaScript SDKs parse only responses of type application/json."""

    media_type = "application/json"
    #: The memory that is held for a large response until the response is sent; None for small ones.
    room: AbstractAsyncContextManager[object, bool | None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, in parts if memory is held for it; then release the memory."""
        if self.room is None:
            await super().__call__(scope, receive, send)
            return
        async with self.room:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            # uvicorn buffers a whole part, and waits for the client before it accepts the next one.
            for start in range(0, len(self.body), _CHUNK):
                part = self.body[start : start + _CHUNK]
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body"})

    def render(self, content: object) -> bytes:
        """Serialize the content as JSON. Content of type bytes is JSON already, and stays as it is."""
        return content if isinstance(content, bytes) else to_json(content, inf_nan_mode="null")


def urls(job: Job) -> dict[str, str]:
    """Build the absolute URLs of a request. As at fal, they contain only the first two segments of the endpoint id."""
    app = "/".join(job.endpoint.split("/")[:2])
    # Under a host named `queue.*`, all paths belong to the queue. Under other hosts, the path must start with /queue,
    # because some clients build further URLs from this URL.
    host = job.base_url.split("://", 1)[-1]
    prefix = "" if host.startswith("queue.") else "/queue"
    url = f"{job.base_url}{prefix}/{app}/requests/{job.request_id}"
    return {"response_url": url, "status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}


def submit_body(job: Job, position: int) -> dict[str, Any]:
    """Build the body of the response to a submit, with every field that one of fal's SDKs reads."""
    return {
        "status": State.IN_QUEUE,
        "request_id": job.request_id,
        **urls(job),
        "queue_position": position,
        "logs": None,
        "metrics": {},
    }


def status_body(job: Job, position: int, logs: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """Build the body of a status response. `logs` is None if the client did not request logs."""
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
        body["metrics"].update(job.provenance)
        if job.error is not None:
            body["error"] = job.error
        if job.error_type is not None:
            body["error_type"] = job.error_type
    return body


def progress_event(job: Job) -> dict[str, Any]:
    """Build a progress event of /stream, with the preview if there is one."""
    body: dict[str, Any] = {"type": "progress", "step": job.step, "num_inference_steps": job.num_steps}
    return body if job.preview is None else {**body, "preview": job.preview}


def result_response(outcome: Outcome) -> FalJSONResponse:
    """Build the response of a finished job from its outcome, with fal's headers."""
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
    """Set the x-fal-request-id header to the job's id; return the response."""
    response.headers[HEADER] = job.request_id
    return response
