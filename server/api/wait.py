"""Waiting for a job, and cancelling it when its client disconnects."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import Request, Response

from server.api.dependencies import Services, get_services, result_response_of
from server.api.openai.errors import error_response
from server.api.responses import FalJSONResponse, with_request_id
from server.errors import InternalError
from server.queue.jobs import Job, Outcome, State


async def response_when_done(request: Request, job: Job, render: Callable[[Outcome], FalJSONResponse]) -> Response:
    """Wait until the job ends, and return what `render` makes of its outcome. Cancel the job if its client disconnects.

    If the server stops first, the response is that error, in the shape of the request's API. Every response has the
    job's id. Raises TooManyRequests if the job's owner has too many open responses, and NotFound if the job is deleted.
    """
    services = get_services(request)
    try:
        await _wait_for_outcome(request, services, job)
        # With `is_patient`, wait for memory without a limit, because a finished output should not be refused.
        response: Response = await result_response_of(services, job, render, is_patient=True)
    except InternalError as error:
        response = error_response(error, request.url.path)
    return with_request_id(response, job)


async def _wait_for_outcome(request: Request, services: Services, job: Job) -> None:
    """Wait until the job ends. Cancel the job if its client disconnects.

    Raises InternalError if the server stops or the client disconnects before the job ends, and TooManyRequests if the
    job's owner has too many open responses.
    """
    with cancel_on_disconnect(services, job), services.notifier.subscribe(job.request_id) as event:
        disconnect = asyncio.create_task(_disconnected(request))
        disconnect.add_done_callback(lambda _: event.set())
        try:
            while job.state != State.COMPLETED and not disconnect.done() and not services.notifier.is_closing:
                event.clear()
                await event.wait()
        finally:
            disconnect.cancel()
    if job.state != State.COMPLETED:
        raise InternalError("The server is stopping.")


@contextmanager
def cancel_on_disconnect(services: Services, job: Job) -> Iterator[None]:
    """Cancel the job if the block ends before the job does, for any reason.

    Raises TooManyRequests, and cancels the job, if its owner has too many open responses.
    """
    try:
        with services.open_answers.held(job.owner):
            yield
    finally:
        # While the server stops, the database may already be closed. The next start ends the job instead.
        if job.state != State.COMPLETED and not services.notifier.is_closing:
            # Do not await the cancellation, because this may run while the connection's own task is being cancelled.
            services.executor.submit(job.owner, services.queue.cancel, job)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
