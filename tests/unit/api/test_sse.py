"""Tests of event streams: the context manager of a stream exits when the stream ends, however early."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from server.api.sse import EventStream


def sent_messages(events: list[str], disconnects: bool) -> list[Any]:
    """Return the ASGI messages of a stream of one object; add "started" and "exited" to `events` as they happen.

    The client stays connected, or, with `disconnects`, disconnects before the stream starts.
    """
    sent: list[Any] = []

    @contextmanager
    def context() -> Iterator[None]:
        yield
        events.append("exited")

    async def objects() -> AsyncIterator[dict[str, Any] | None]:
        events.append("started")
        yield {"step": 1}

    async def receive() -> dict[str, str]:
        if not disconnects:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        # Simulate a slow socket, so that the stream notices the disconnect first.
        for _ in range(10 if disconnects else 0):
            await asyncio.sleep(0)

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(EventStream(objects(), context=context())(scope, receive, send))
    return sent


def test_the_context_exits_when_the_stream_ends() -> None:
    events: list[str] = []
    sent = sent_messages(events, disconnects=False)
    assert events == ["started", "exited"]
    assert sent[1]["body"] == b'data: {"step":1}\n\n'


def test_the_context_exits_when_the_client_disconnects_before_the_first_event() -> None:
    events: list[str] = []
    sent_messages(events, disconnects=True)
    assert events == ["exited"]
