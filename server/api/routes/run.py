"""Run: one request, answered when it is done; stream: the same with its progress."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api import responses
from server.api.dependencies import (
    Services,
    get_model,
    open_output,
    authenticate_with_token,
    authenticate,
    get_services,
    result_response_of,
    parse_request,
)
from server.api.sse import EventStream, AbortStream, wait_or_heartbeat
from server.api.wait import cancel_on_disconnect, wait_for_outcome
from server.errors import InternalError
from server.queue.jobs import Job, Mode, State

router = APIRouter(tags=["run"])


@router.post("/{endpoint:path}/stream", include_in_schema=False)
async def stream(request: Request, endpoint: str) -> Response:
    """Progress as events, then the output as the last one."""
    parts = get_services(request)
    job = await _accepted(request, parts, endpoint, Mode.STREAM)
    response = EventStream(_progress(parts, job), context=cancel_on_disconnect(parts, job))
    response.headers["x-fal-request-id"] = job.request_id
    return response


@router.post("/{endpoint:path}", include_in_schema=False)
async def run(request: Request, endpoint: str) -> Response:
    """Wait for the output. The work stops when the client leaves."""
    parts = get_services(request)
    job = await _accepted(request, parts, endpoint, Mode.RUN)
    try:
        await wait_for_outcome(request, parts, job)
        # It is made: it is not refused any more.
        response: Response = await result_response_of(parts, job, responses.result_response, is_patient=True)
    except InternalError as error:
        response = responses.error_response(error)
    response.headers["x-fal-request-id"] = job.request_id
    return response


async def _accepted(request: Request, parts: Services, endpoint: str, mode: Mode) -> Job:
    # Browsers stream with a token. Without key or token nobody is told which endpoints there are.
    takes_token = mode == Mode.STREAM and endpoint in parts.models
    owner = authenticate_with_token(request, endpoint) if takes_token else authenticate(request)
    model = get_model(request, endpoint)
    submission = await parse_request(request, model, owner, mode)
    return await parts.turns.run(owner, parts.queue.submit, submission)


async def _progress(parts: Services, job: Job) -> AsyncIterator[dict[str, Any] | None]:
    told, shown = 0, None
    with parts.notifier.subscribe(job.request_id) as bell:
        while job.state != State.COMPLETED:
            bell.clear()
            if job.step != told:
                told, event = job.step, responses.progress_event(job)
                # A preview that was sent is not sent again; one that nobody had time for was replaced by a newer one.
                if "preview" in event and event["preview"] is shown:
                    del event["preview"]
                shown = event.get("preview", shown)
                yield event
            if parts.notifier.is_closing:
                yield InternalError("The server is stopping.").body
                raise AbortStream
            if not await wait_or_heartbeat(bell):
                yield None
    async with open_output(parts, job) as (outcome, output):
        yield output
    if outcome.status != 200:
        raise AbortStream
