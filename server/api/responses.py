"""The shapes on the wire: submit reply, status, result, errors, events, and the URLs of a request."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import HEADERS_BY_TYPE, ServerError
from server.queue.jobs import Job, Outcome, State

#: fal answers 202 while a request is pending and 200 when it is done; `fal.apps` tells them apart by this alone.
STATUS_CODES = {State.IN_QUEUE: 202, State.IN_PROGRESS: 202, State.COMPLETED: 200}


_CHUNK = 2**16


class FalJSONResponse(Response):
    """JSON with the application/json type that the JavaScript SDKs decide by; NaN is sent as null."""

    media_type = "application/json"
    #: What is held while it is sent, for an answer that may be large.
    room: AbstractAsyncContextManager[object, bool | None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, once there is room."""
        if self.room is None:
            await super().__call__(scope, receive, send)
            return
        async with self.room:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            # In parts, because uvicorn takes what it is given at once and waits for the client before the next.
            for start in range(0, len(self.body), _CHUNK):
                part = self.body[start : start + _CHUNK]
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body"})

    def render(self, content: object) -> bytes:
        """Serialize; strings that are JSON already pass through as bytes."""
        return content if isinstance(content, bytes) else to_json(content, inf_nan_mode="null")


def urls(job: Job) -> dict[str, str]:
    """The three URLs of a request: absolute, under the two-segment id as fal's own are."""
    app = "/".join(job.endpoint.split("/")[:2])
    # By Host `queue.*` the role is in the name; everywhere else it is in the path, which some clients rebuild from.
    host = job.base_url.split("://", 1)[-1]
    prefix = "" if host.startswith("queue.") else "/queue"
    url = f"{job.base_url}{prefix}/{app}/requests/{job.request_id}"
    return {"response_url": url, "status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}


def submit_body(job: Job, position: int) -> dict[str, Any]:
    """The reply to a submit: the union of what all SDKs read."""
    return {
        "status": State.IN_QUEUE,
        "request_id": job.request_id,
        **urls(job),
        "queue_position": position,
        "logs": None,
        "metrics": {},
    }


def status_body(job: Job, position: int, logs: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """A status object. `logs` is None unless they were asked for; then a list, even when empty."""
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
    """One event of /stream before the output."""
    body: dict[str, Any] = {"type": "progress", "step": job.step, "num_inference_steps": job.num_steps}
    return body if job.preview is None else {**body, "preview": job.preview}


def result_response(outcome: Outcome) -> FalJSONResponse:
    """The model's own answer, status and headers included."""
    headers = dict(HEADERS_BY_TYPE.get(outcome.error_type or "", {}))
    if outcome.error_type:
        headers["x-fal-error-type"] = outcome.error_type
    if outcome.status >= 500:
        headers["x-fal-retryable"] = "true"
    headers.setdefault("x-fal-billable-units", str(outcome.billable_units))
    return FalJSONResponse(outcome.body.encode(), outcome.status, headers)


def error_response(problem: ServerError) -> Response:
    """An error in fal's shape."""
    headers = dict(problem.headers)
    if problem.error_type:
        headers["x-fal-error-type"] = problem.error_type
    return FalJSONResponse(problem.body, problem.status, headers)


def with_request_id(response: Response, job: Job) -> Response:
    """The response, with the header that says which request it is about."""
    response.headers["x-fal-request-id"] = job.request_id
    return response
