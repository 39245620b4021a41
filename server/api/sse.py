"""Server-sent events: JSON objects on an open stream."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pydantic_core import to_json
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

#: Seconds between comments, as at fal, so that no proxy closes a silent stream.
HEARTBEAT = 15.0
#: The size in bytes of the parts in which a long event is sent.
_PART = 2**16


class AbortStream(Exception):
    """A failure after the response has started: the only way left to signal the failure is to cut the connection."""


class EventStream(StreamingResponse):
    """A response that sends each object as one `data:` event, and each None as a heartbeat.

    The package sse-starlette is not used, because it replaces a method of uvicorn's server for the whole process, and
    cuts streams when the server stops. With this class, a stream can send a last event before the server stops.
    """

    media_type = "text/event-stream"

    def __init__(
        self, objects: AsyncIterator[Mapping[str, Any] | None], context: AbstractContextManager[None] | None = None
    ) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(_encoded(objects), headers=headers)
        self._within = context or nullcontext()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream inside `context`, which ends even if the client disconnects before the first event."""
        with self._within:
            await super().__call__(scope, receive, send)


async def wait_or_heartbeat(event: asyncio.Event) -> bool:
    """Wait for the event up to HEARTBEAT seconds; return False if a heartbeat is due."""
    try:
        async with asyncio.timeout(HEARTBEAT):
            await event.wait()
    except TimeoutError:
        return False
    return True


async def _encoded(objects: AsyncIterator[Mapping[str, Any] | None]) -> AsyncIterator[bytes]:
    async for item in objects:
        event = b": heartbeat\n\n" if item is None else b"data: " + to_json(item, inf_nan_mode="null") + b"\n\n"
        # uvicorn buffers a whole part, and waits for the client before it accepts the next one.
        for start in range(0, len(event), _PART):
            yield event[start : start + _PART]
