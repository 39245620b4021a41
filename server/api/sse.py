"""Server-sent events: JSON objects on a stream that stays open."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pydantic_core import to_json
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

#: fal sends a comment this often, in seconds, so that nobody in between closes a silent stream.
HEARTBEAT = 15.0
_PART = 2**16


class AbortStream(Exception):
    """Cut the connection after the last event: 200 was said already, so only this tells a client of failure."""


class EventStream(StreamingResponse):
    """Each object as one `data:` event; None stands for a heartbeat.

    Starlette's own response rather than sse-starlette, which replaces a method of uvicorn's server for the whole
    process and cuts a stream at the stop, where ours sends a last event.
    """

    media_type = "text/event-stream"

    def __init__(
        self, objects: AsyncIterator[Mapping[str, Any] | None], context: AbstractContextManager[None] | None = None
    ) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(_encoded(objects), headers=headers)
        self._within = context or nullcontext()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream inside the given context, which ends also when the client leaves before the first event."""
        with self._within:
            await super().__call__(scope, receive, send)


async def wait_or_heartbeat(event: asyncio.Event) -> bool:
    """Wait for the bell; False when it is time for a heartbeat first."""
    try:
        async with asyncio.timeout(HEARTBEAT):
            await event.wait()
    except TimeoutError:
        return False
    return True


async def _encoded(objects: AsyncIterator[Mapping[str, Any] | None]) -> AsyncIterator[bytes]:
    async for item in objects:
        event = b": heartbeat\n\n" if item is None else b"data: " + to_json(item, inf_nan_mode="null") + b"\n\n"
        # In parts, because uvicorn takes what it is given at once and waits for the client before the next.
        for start in range(0, len(event), _PART):
            yield event[start : start + _PART]
