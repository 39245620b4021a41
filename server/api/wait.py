"""Waiting for a job, and cancelling it when its client disconnects."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request

from server.api.dependencies import Services
from server.errors import InternalError
from server.queue.jobs import Job, State


async def wait_for_outcome(request: Request, services: Services, job: Job) -> None:
    """Wait for the end of the job; it ends with its client. Raises InternalError when the server stops first."""
    with cancel_on_disconnect(services, job), services.notifier.subscribe(job.request_id) as event:
        gone = asyncio.create_task(_disconnected(request))
        gone.add_done_callback(lambda _: event.set())
        try:
            while job.state != State.COMPLETED and not gone.done() and not services.notifier.is_closing:
                event.clear()
                await event.wait()
        finally:
            gone.cancel()
    if job.state != State.COMPLETED:
        raise InternalError("The server is stopping.")


@contextmanager
def cancel_on_disconnect(services: Services, job: Job) -> Iterator[None]:
    """Whatever ends the connection ends the job: nothing is painted for nobody. Raises TooManyRequests."""
    try:
        with services.open_answers.held(job.owner):
            yield
    finally:
        # When the server stops, the next start ends it: by then the database may be closed here.
        if job.state != State.COMPLETED and not services.notifier.is_closing:
            # Not awaited: this may run while the connection's own task is being cancelled.
            services.executor.submit(job.owner, services.queue.cancel, job)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
