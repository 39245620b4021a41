"""Run: one request, answered when it is done; stream: the same with its progress."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request, Response

from server import wire
from server.errors import InternalError
from server.events import EventStream, StreamFailed, heard
from server.jobs import Job, Mode, State
from server.routes import Parts, model_for, output_of, owner_by_token, owner_of, parts_of, result_of, submission_of

router = APIRouter(tags=["run"])


@router.post("/{endpoint:path}/stream", include_in_schema=False)
async def stream(request: Request, endpoint: str) -> Response:
    """Progress as events, then the output as the last one."""
    parts = parts_of(request)
    job = await _accepted(request, parts, endpoint, Mode.STREAM)
    response = EventStream(_progress(parts, job), within=bound_to_client(parts, job))
    response.headers["x-fal-request-id"] = job.request_id
    return response


@router.post("/{endpoint:path}", include_in_schema=False)
async def run(request: Request, endpoint: str) -> Response:
    """Wait for the output. The work stops when the client leaves."""
    parts = parts_of(request)
    job = await _accepted(request, parts, endpoint, Mode.RUN)
    try:
        await ended(request, parts, job)
        # It is made: it is not refused any more.
        response: Response = await result_of(parts, job, wire.result, is_patient=True)
    except InternalError as error:
        response = wire.error(error)
    response.headers["x-fal-request-id"] = job.request_id
    return response


async def ended(request: Request, parts: Parts, job: Job) -> None:
    """Wait for the end of the job; it ends with its client. Raises InternalError when the server stops first."""
    with bound_to_client(parts, job), parts.notifier.listen(job.request_id) as bell:
        gone = asyncio.create_task(_disconnected(request))
        gone.add_done_callback(lambda _: bell.set())
        try:
            while job.state != State.COMPLETED and not gone.done() and not parts.notifier.is_closing:
                bell.clear()
                await bell.wait()
        finally:
            gone.cancel()
    if job.state != State.COMPLETED:
        raise InternalError("The server is stopping.")


async def _accepted(request: Request, parts: Parts, endpoint: str, mode: Mode) -> Job:
    # Browsers stream with a token. Without key or token nobody is told which endpoints there are.
    takes_token = mode == Mode.STREAM and endpoint in parts.models
    owner = owner_by_token(request, endpoint) if takes_token else owner_of(request)
    model = model_for(request, endpoint)
    submission = await submission_of(request, model, owner, mode)
    return await parts.turns.run(owner, parts.queue.submit, submission)


@contextmanager
def bound_to_client(parts: Parts, job: Job) -> Iterator[None]:
    """Whatever ends the connection ends the job: nothing is painted for nobody. Raises TooManyRequests."""
    try:
        with parts.open_answers.held(job.owner):
            yield
    finally:
        # When the server stops, the next start ends it: by then the database may be closed here.
        if job.state != State.COMPLETED and not parts.notifier.is_closing:
            # Not awaited: this may run while the connection's own task is being cancelled.
            parts.turns.begin(job.owner, parts.queue.cancel, job)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _progress(parts: Parts, job: Job) -> AsyncIterator[dict[str, Any] | None]:
    told, shown = 0, None
    with parts.notifier.listen(job.request_id) as bell:
        while job.state != State.COMPLETED:
            bell.clear()
            if job.step != told:
                told, event = job.step, wire.progress(job)
                # A preview that was sent is not sent again; one that nobody had time for was replaced by a newer one.
                if "preview" in event and event["preview"] is shown:
                    del event["preview"]
                shown = event.get("preview", shown)
                yield event
            if parts.notifier.is_closing:
                yield InternalError("The server is stopping.").body
                raise StreamFailed
            if not await heard(bell):
                yield None
    async with output_of(parts, job) as (outcome, output):
        yield output
    if outcome.status != 200:
        raise StreamFailed
