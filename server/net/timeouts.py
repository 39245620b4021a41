"""Time limits for clients. uvicorn has none, so a slow client could occupy a connection forever."""

import asyncio
import logging
import socket
import struct
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger(__name__)

_NO_LINGER = struct.pack("ii", 1, 0)


class TimeoutProtocol(HttpToolsProtocol):
    """uvicorn's protocol with time limits, in seconds.

    A client that exceeds a limit is disconnected without a response, because some clients retry at once after a 408.
    A body may take `body_timeout` seconds, plus one second for each `body_rate` bytes, and may pause for `gap_seconds`.
    A client may read its response slowly, as long as it keeps reading.
    """

    # The documented limits are 10 s, 20 s and 60 s. Timers fire late in a busy process, so these are a little shorter.
    header_timeout = 9.5
    #: The most bytes of a request line with its headers, of trailers, and of the framing between two pieces of a body.
    #: httptools itself has no limit. A read in which a request begins, or a piece of the body arrives, is not counted.
    header_bytes = 65_536
    body_timeout = 59.0
    #: The longest pause within a body, however fast the body came before.
    gap_seconds = 19.5
    #: Bytes of a body that extend its limit by one second.
    body_rate = 16_384
    write_timeout = 59.0
    max_connections = 4096

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer of a new connection, or close the connection at once if there are too many."""
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._body_started_at, self._last_data_at, self._received = 0.0, 0.0, 0
        self._non_body_bytes = 0
        if len(self.connections) > self.max_connections:
            message = "a port has %d connections, its limit by --max-connections or ulimit; another one is refused"
            log.warning(message, self.max_connections)
            self._reset()
        else:
            self._arm_timer(self.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._cancel_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count received bytes, and disconnect a client whose headers or trailers are too long."""
        self._non_body_bytes += len(data)
        super().data_received(data)
        if self._non_body_bytes > self.header_bytes:
            self._reset()

    def on_message_begin(self) -> None:
        """Start the header timer at the first byte of a request."""
        super().on_message_begin()
        self._non_body_bytes, self._body_started_at = 0, 0.0
        if self._timer is None:
            self._arm_timer(self.header_timeout)

    def on_headers_complete(self) -> None:
        """Start the body timer after the headers."""
        super().on_headers_complete()
        self._body_started_at = self._last_data_at = self.loop.time()
        self._received = 0
        self._arm_timer(min(self.body_timeout, self.gap_seconds))

    def on_body(self, body: bytes) -> None:
        """Count a piece of the body. Each piece resets the count of `header_bytes`, so a body may have many chunks."""
        self._non_body_bytes = 0
        self._received += len(body)
        self._last_data_at = self.loop.time()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the timer, because the request is complete."""
        self._cancel_timer()
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        """Stop the timer, because the WebSocket protocol takes over."""
        self._cancel_timer()
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        """Start the response timer, because the client does not read its response fast enough."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_timeout, self._reset)

    def resume_writing(self) -> None:
        """Stop the response timer, because the client reads again."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _arm_timer(self, seconds: float) -> None:
        self._cancel_timer()
        self._timer = self.loop.call_later(seconds, self._on_timeout)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        self._timer = None
        if not self._body_started_at:
            self._reset()
            return
        now = self.loop.time()
        if self.flow.read_paused:
            # The server itself has paused reading, so this time does not count against the client.
            self._body_started_at, self._last_data_at = self._body_started_at + now - self._last_data_at, now
        average = self._body_started_at + self.body_timeout + self._received / self.body_rate
        left = min(average, self._last_data_at + self.gap_seconds) - now
        if left > 0:
            self._arm_timer(left)
        else:
            self._reset()

    def _reset(self) -> None:
        # A linger time of 0 makes the system reset the connection. Otherwise it would keep the unsent data and wait for
        # the client to read it.
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()


def with_limits(**limits: Any) -> type[TimeoutProtocol]:
    """Return a subclass of TimeoutProtocol with these class attributes."""
    return type("TimeoutProtocol", (TimeoutProtocol,), limits)


def limit_tls_handshake(loop: asyncio.AbstractEventLoop, seconds: float = TimeoutProtocol.header_timeout) -> None:
    """Limit the seconds of TLS handshakes. uvicorn has no option for this, and asyncio's default is a minute."""
    create_server = loop.create_server

    def create_limited_server(*arguments: Any, ssl: Any = None, **options: Any) -> Any:
        if ssl is not None:
            options["ssl_handshake_timeout"] = seconds
        return create_server(*arguments, ssl=ssl, **options)

    loop.create_server = create_limited_server  # type: ignore[method-assign]
