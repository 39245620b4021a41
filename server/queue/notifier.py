"""Notifications that wake listeners when a job changes. They carry no data; listeners re-read the job."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: Topic: a job left or re-entered the queue, so positions may have changed.
QUEUE = "queue"
#: Topic: a webhook may be due.
WEBHOOKS = "webhooks"
#: Topic: the worker ended unexpectedly.
WORKER = "worker"


class Notifier:
    """A notifier that any thread may call. Listeners wait on the event loop; the worker waits for `work_available`."""

    def __init__(self) -> None:
        self.work_available = threading.Event()
        #: `is_stopping`: the server is shutting down and finishes running jobs. `is_closing`: responses must end now.
        self.is_stopping, self.is_closing = False, False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: dict[str, set[asyncio.Event]] = {}

    def bind_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the event loop that the listeners wait on."""
        self._loop = loop

    def notify(self, *topics: str) -> None:
        """Wake the listeners of these topics. A topic is a request id or one of this module's constants."""
        # Without a listener there is nothing to do: a client that subscribes later reads the row first.
        if self._loop and any(topic in self._listeners for topic in topics):
            self._loop.call_soon_threadsafe(self._notify, topics)

    def close(self) -> None:
        """Set `is_closing`, and wake the worker and all listeners, because the server shuts down."""
        self.is_closing = True
        self.work_available.set()
        self.notify(*list(self._listeners))

    @contextmanager
    def subscribe(self, *topics: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set when one of these topics is notified. Call on the event loop only.

        Clear the event before reading the row: a change between the reading and a later clearing would go unnoticed.
        """
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
