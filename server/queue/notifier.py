"""A bell that rings when a row changed. It carries no data: whoever hears it reads the row."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: Rung when the queue moved, so that positions changed.
QUEUE = "queue"
#: Rung when a webhook fell due.
WEBHOOKS = "webhooks"
#: Rung when the worker ended by itself.
WORKER = "worker"


class Notifier:
    """Rung from any thread; heard on the event loop, and by the worker through `work`."""

    def __init__(self) -> None:
        self.work_available = threading.Event()
        #: The server takes its leave: it finishes what it can. Then it is closing, and nobody waits any more.
        self.is_stopping, self.is_closing = False, False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: dict[str, set[asyncio.Event]] = {}

    def bind_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say which loop the listeners live on."""
        self._loop = loop

    def notify(self, *topics: str) -> None:
        """Wake whoever listens to one of these topics: a request id or one of the above."""
        # Without a listener there is nothing to wake; one that comes later reads the row first.
        if self._loop and any(topic in self._listeners for topic in topics):
            self._loop.call_soon_threadsafe(self._notify, topics)

    def close(self) -> None:
        """Wake everybody for good: the server is going down."""
        self.is_closing = True
        self.work_available.set()
        self.notify(*list(self._listeners))

    @contextmanager
    def subscribe(self, *topics: str) -> Iterator[asyncio.Event]:
        """Hear these topics; on the event loop only. Clear the bell before reading the row."""
        event = asyncio.Event()
        for topic in topics:
            self._listeners.setdefault(topic, set()).add(event)
        try:
            yield event
        finally:
            for topic in topics:
                self._listeners[topic].discard(event)
                if not self._listeners[topic]:
                    del self._listeners[topic]

    def _notify(self, topics: tuple[str, ...]) -> None:
        for topic in topics:
            for event in self._listeners.get(topic, ()):
                event.set()
