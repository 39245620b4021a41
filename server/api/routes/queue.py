"""fal's queue API: submit, status, status stream, result, delete, cancel."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response

from server.api import responses
from server.api.dependencies import (
    Services,
    authenticate,
    get_model,
    get_services,
    parse_request,
    require_owned_job,
    result_response_of,
)
from server.api.headers import Flag
from server.api.operations import content
from server.api.responses import FalJSONResponse
from server.api.schemas.queue import Cancellation, QueueStatus
from server.api.sse import EventStream, wait_or_heartbeat
from server.errors import AlreadyCompleted, MethodNotAllowed, NotFound, StillInProgress
from server.queue.jobs import Job, Mode, State
from server.queue.notifier import QUEUE

router = APIRouter(prefix="/queue", tags=["queue"])

App = Annotated[str, Path(description="The endpoint, or its first two parts.", examples=["fal-ai/flux/dev"])]
RequestID = Annotated[str, Path(description="The request id that the submit returned.")]
Logs = Annotated[Flag, Query(description="With 1, the status contains the log.")]
Previews = Annotated[Flag, Query(description="With 1, events contain previews of the image as data URIs.")]


@router.get(
    "/{app:path}/requests/{request_id}/status",
    summary="Get the status of a request",
    response_model=QueueStatus,
    response_description="The status of a request that is done.",
    responses={202: {"model": QueueStatus, "description": "The status of a request that is not done yet."}},
)
async def status(request: Request, app: App, request_id: RequestID, logs: Logs = False) -> Response:
    """Return the status of a request, with 202 until the request is done and 200 afterwards."""
    services = get_services(request)
    job = await _job(request, services, app, request_id)
    body = _status(services, job, job.logs if logs else None)
    return responses.with_request_id(FalJSONResponse(body, responses.STATUS_CODES[job.state]), job)


@router.get(
    "/{app:path}/requests/{request_id}/status/stream",
    summary="Follow the status of a request",
    response_class=Response,
    response_description="Events, each with a status as JSON.",
    responses={200: content("text/event-stream")},
)
async def status_stream(
    request: Request, app: App, request_id: RequestID, logs: Logs = False, previews: Previews = False
) -> Response:
    """Stream status events until the request is done. `logs=1` adds new log lines, `previews=1` preview images."""
    services = get_services(request)
    job = await _job(request, services, app, request_id)
    job.wants_previews |= previews
    changes = _status_events(services, job, logs)
    return responses.with_request_id(EventStream(changes, context=services.open_answers.held(job.owner)), job)


@router.get(
    "/{app:path}/requests/{request_id}", summary="Get the result of a request", response_description="The output."
)
@router.get("/{app:path}/requests/{request_id}/response", include_in_schema=False)
async def result(request: Request, app: App, request_id: RequestID) -> Response:
    """Return the model's output, or the error that ended the request; 400 while the request is unfinished."""
    services = get_services(request)
    job = await _job(request, services, app, request_id)
    if job.state != State.COMPLETED:
        raise StillInProgress
    return responses.with_request_id(await result_response_of(services, job, responses.result_response), job)


@router.delete(
    "/{app:path}/requests/{request_id}",
    summary="Delete a finished request",
    status_code=204,
    response_description="The request was deleted.",
)
async def delete(request: Request, app: App, request_id: RequestID) -> Response:
    """Delete a finished request with its prompt and its images; 400 while the request is unfinished."""
    services = get_services(request)
    job = await _job(request, services, app, request_id)
    await services.executor.run(job.owner, services.retention.delete, job)
    return responses.with_request_id(Response(status_code=204), job)


@router.put(
    "/{app:path}/requests/{request_id}/cancel",
    summary="Cancel a request",
    response_model=Cancellation,
    response_description="The request was waiting, and is cancelled.",
    responses={202: {"model": Cancellation, "description": "The request is running, and stops after its next step."}},
)
async def cancel(request: Request, app: App, request_id: RequestID) -> Response:
    """Cancel a request: 200 if it was waiting, 202 if it is running, 400 if it is already done, 404 if unknown."""
    services = get_services(request)
    try:
        job = await _job(request, services, app, request_id)
    except NotFound as error:
        return FalJSONResponse({"status": "NOT_FOUND", **error.body}, 404)
    state = await services.executor.run(job.owner, services.queue.cancel, job)
    return responses.with_request_id(_CANCELLED[state](), job)


@router.post("/{endpoint:path}", include_in_schema=False)
async def submit(request: Request, endpoint: str) -> Response:
    """Submit a request to the queue. The request is on the disk before the response is sent."""
    if "/requests/" in endpoint:
        raise MethodNotAllowed
    services = get_services(request)
    owner = authenticate(request)
    model = get_model(request, endpoint)
    submission = await parse_request(request, model, owner, Mode.QUEUE)
    job = await services.executor.run(owner, services.queue.submit, submission)
    return responses.with_request_id(FalJSONResponse(responses.submit_body(job, services.queue.position(job))), job)


_CANCELLED = {
    State.IN_QUEUE: lambda: FalJSONResponse({"status": "OK"}),
    State.IN_PROGRESS: lambda: FalJSONResponse({"status": "CANCELLATION_REQUESTED"}, 202),
    State.COMPLETED: lambda: FalJSONResponse({"status": "ALREADY_COMPLETED", **AlreadyCompleted().body}, 400),
}


async def _job(request: Request, services: Services, app: str, request_id: str) -> Job:
    """Return this caller's job, from memory if possible, otherwise from the database. Raises NotFound."""
    owner = authenticate(request)
    job = services.queue.get_cached(request_id) or await services.executor.run(owner, services.queue.get, request_id)
    return require_owned_job(job, owner, app)


async def _status_events(services: Services, job: Job, wants_logs: bool) -> AsyncIterator[dict[str, Any] | None]:
    last_sent: dict[str, Any] = {}
    num_logs, last_preview = 0, None
    with services.notifier.subscribe(job.request_id, QUEUE) as event:
        while True:
            event.clear()
            logs = job.logs[num_logs:]
            body = _status(services, job, logs if wants_logs else None)
            preview = job.preview if job.wants_previews and job.preview is not last_preview else None
            # When the server closes the stream, one last event is sent even if nothing has changed.
            if body != last_sent or preview or services.notifier.is_closing:
                num_logs += len(logs)
                last_sent = _status(services, job, [] if wants_logs else None)
                last_preview = job.preview
                yield {**body, "preview": preview} if preview else body
            if body["status"] == State.COMPLETED or services.notifier.is_closing:
                return
            if not await wait_or_heartbeat(event):
                yield None


def _status(services: Services, job: Job, logs: list[dict[str, Any]] | None) -> dict[str, Any]:
    return responses.status_body(job, services.queue.position(job) if job.state == State.IN_QUEUE else 0, logs)
