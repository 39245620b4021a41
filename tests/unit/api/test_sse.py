"""Event streams: what they are bound to ends with them, whenever that is."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from server.api.sse import EventStream


def streamed(heard: list[str], leaves: bool) -> list[Any]:
    """The messages of a stream of one object, to a client that stays or that has left already."""
    sent: list[Any] = []

    @contextmanager
    def bound() -> Iterator[None]:
        yield
        heard.append("ended")

    async def objects() -> AsyncIterator[dict[str, Any] | None]:
        heard.append("began")
        yield {"step": 1}

    async def receive() -> dict[str, str]:
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        # A socket that takes its time, so that the client's leaving is noticed first.
        for _ in range(10 if leaves else 0):
            await asyncio.sleep(0)

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(EventStream(objects(), context=bound())(scope, receive, send))
    return sent


def test_a_stream_ends_what_it_is_bound_to() -> None:
    heard: list[str] = []
    sent = streamed(heard, leaves=False)
    assert heard == ["began", "ended"]
    assert sent[1]["body"] == b'data: {"step":1}\n\n'


def test_a_client_that_leaves_before_the_first_event_ends_it_too() -> None:
    heard: list[str] = []
    streamed(heard, leaves=True)
    assert heard == ["ended"]
