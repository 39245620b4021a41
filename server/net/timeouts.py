"""How long a client may take: uvicorn itself waits for ever, and so would everything that a connection holds."""

import asyncio
import logging
import socket
import struct
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger(__name__)

_NO_LINGER = struct.pack("ii", 1, 0)


class TimeoutProtocol(HttpToolsProtocol):
    """uvicorn's own, with an end to its patience, in seconds.

    Whoever takes longer is cut off without an answer: some clients repeat at once what is answered with 408. A body
    may come slowly but steadily, and an answer may be read so; what came fast before earns no long silence.
    """

    # Promised are 10 s, 20 s and 60 s; in a busy process a timer comes late.
    header_seconds = 9.5
    #: Of a request line and its headers, of trailers, and of what stands between two parts of a body; beside what comes
    #: with the first of it. httptools itself has no limit.
    header_bytes = 65_536
    body_seconds = 59.0
    #: The longest that nothing may come of a body, however fast it came before.
    gap_seconds = 19.5
    #: Bytes of a body that earn one more second.
    body_rate = 16_384
    answer_seconds = 59.0
    max_connections = 4096

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection; one too many is closed at once."""
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None
        self._begun, self._heard, self._received = 0.0, 0.0, 0
        self._beside_body = 0
        if len(self.connections) > self.max_connections:
            log.warning("more than %d connections are open; another one is refused", self.max_connections)
            self._reset()
        else:
            self._arm_timer(self.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is waited for any more."""
        self._cancel_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Whatever comes; a header or trailer without end is cut off."""
        self._beside_body += len(data)
        super().data_received(data)
        if self._beside_body > self.header_bytes:
            self._reset()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._beside_body, self._begun = 0, 0.0
        if self._timer is None:
            self._arm_timer(self.header_seconds)

    def on_headers_complete(self) -> None:
        """From here on the body is waited for."""
        super().on_headers_complete()
        self._begun = self._heard = self.loop.time()
        self._received = 0
        self._arm_timer(min(self.body_seconds, self.gap_seconds))

    def on_body(self, body: bytes) -> None:
        """A part of it, be it one byte: however small the chunks are, a whole body passes."""
        self._beside_body = 0
        self._received += len(body)
        self._heard = self.loop.time()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of it is here."""
        self._cancel_timer()
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        """Another protocol's matter."""
        self._cancel_timer()
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        """The client does not read what it asked for."""
        super().pause_writing()
        if self._answer_timer is None:
            self._answer_timer = self.loop.call_later(self.answer_seconds, self._reset)

    def resume_writing(self) -> None:
        """It does again."""
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None
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
        if not self._begun:
            self._reset()
            return
        now = self.loop.time()
        if self.flow.read_paused:
            # It is the server that does not read, and the body has come as far as it can.
            self._begun, self._heard = self._begun + now - self._heard, now
        average = self._begun + self.body_seconds + self._received / self.body_rate
        left = min(average, self._heard + self.gap_seconds) - now
        if left > 0:
            self._arm_timer(left)
        else:
            self._reset()

    def _reset(self) -> None:
        # With a reset, or the system would keep what was not read, and wait for it to be.
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()


def with_limits(**limits: Any) -> type[TimeoutProtocol]:
    """The protocol with other limits."""
    return type("TimeoutProtocol", (TimeoutProtocol,), limits)


def limit_tls_handshake(loop: asyncio.AbstractEventLoop, seconds: float = TimeoutProtocol.header_seconds) -> None:
    """Bound those of TLS, which come before any protocol: uvicorn cannot say it, and the loop itself waits a minute."""
    create_server = loop.create_server

    def hurried(*arguments: Any, ssl: Any = None, **options: Any) -> Any:
        if ssl is not None:
            options["ssl_handshake_timeout"] = seconds
        return create_server(*arguments, ssl=ssl, **options)

    loop.create_server = hurried  # type: ignore[method-assign]
