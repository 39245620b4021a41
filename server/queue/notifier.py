"""Notifications that wake listeners when a job changes. They carry no data; listeners re-read the job."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: Topic: the queue moved, so positions changed.
QUEUE = "queue"
#: Topic: a webhook is due.
WEBHOOKS = "webhooks"
#: Topic: the worker ended unexpectedly.
WORKER = "worker"


class Notifier:
    """A notifier for any thread to call. Listeners wait on the event loop, the worker on `work_available`."""

    def __init__(self) -> None:
        self.work_available = threading.Event()
        #: While stopping, the server finishes what it can. While closing, no client waits any longer.
        self.is_stopping, self.is_closing = False, False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: dict[str, set[asyncio.Event]] = {}

    def bind_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the event loop that the listeners wait on."""
        self._loop = loop

    def notify(self, *topics: str) -> None:
        """Wake the listeners of these topics. A topic is a request id or one of this module's constants."""
        # Without a listener there is nothing to do. A later listener reads the row first.
        if self._loop and any(topic in self._listeners for topic in topics):
            self._loop.call_soon_threadsafe(self._notify, topics)

    def close(self) -> None:
        """Wake all listeners for the last time, because the server shuts down."""
        self.is_closing = True
        self.work_available.set()
        self.notify(*list(self._listeners))

    @contextmanager
    def subscribe(self, *topics: str) -> Iterator[asyncio.Event]:
        """Subscribe to these topics, on the event loop only. Clear the event before reading the row."""
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
