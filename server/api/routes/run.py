"""Synchronous runs, whose response is the output, and streams, which also report the progress."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api import responses
from server.api.dependencies import (
    Services,
    authenticate,
    authenticate_with_token,
    get_model,
    get_services,
    open_output,
    parse_request,
    served_endpoint,
)
from server.api.sse import AbortStream, EventStream, wait_or_heartbeat
from server.api.wait import cancel_on_disconnect, response_when_done
from server.errors import InternalError
from server.queue.jobs import Job, Mode, State

router = APIRouter(tags=["run"])


@router.post("/{endpoint:path}/stream", include_in_schema=False)
async def stream(request: Request, endpoint: str) -> Response:
    """Stream the progress as events; the last event is the output."""
    services = get_services(request)
    job = await _submit(request, services, endpoint, Mode.STREAM)
    response = EventStream(_progress(services, job), context=cancel_on_disconnect(services, job))
    return responses.with_request_id(response, job)


@router.post("/{endpoint:path}", include_in_schema=False)
async def run(request: Request, endpoint: str) -> Response:
    """Wait for the output and return it; the job is cancelled if the client disconnects."""
    services = get_services(request)
    job = await _submit(request, services, endpoint, Mode.RUN)
    return await response_when_done(request, job, responses.result_response)


async def _submit(request: Request, services: Services, endpoint: str, mode: Mode) -> Job:
    # Browsers stream with a token. Authentication comes first, so that a caller without a key always gets 401, even for
    # an unknown endpoint.
    takes_token = mode == Mode.STREAM and served_endpoint(services, endpoint) is not None
    owner = authenticate_with_token(request, endpoint) if takes_token else authenticate(request)
    model = get_model(request, endpoint)
    submission = await parse_request(request, model, owner, mode)
    return await services.executor.run(owner, services.queue.submit, submission)


async def _progress(services: Services, job: Job) -> AsyncIterator[dict[str, Any] | None]:
    last_sent, last_preview = 0, None
    with services.notifier.subscribe(job.request_id) as changed:
        while job.state != State.COMPLETED:
            changed.clear()
            if job.step != last_sent:
                last_sent, event = job.step, responses.progress_event(job)
                # Send each preview once. A preview that was not sent in time has been replaced by a newer one.
                if "preview" in event and event["preview"] is last_preview:
                    del event["preview"]
                last_preview = event.get("preview", last_preview)
                yield event
            if services.notifier.is_closing:
                yield InternalError("The server is stopping.").body
                raise AbortStream
            if not await wait_or_heartbeat(changed):
                yield None
    async with open_output(services, job) as (outcome, output):
        yield output
    if outcome.status != 200:
        raise AbortStream
