"""WebSockets with counted bytes. uvicorn collects whole messages, so large incomplete ones could fill the memory."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from server.errors import TooManyRequests
from server.net.bytes_in_flight import SMALL, BytesInFlight

#: The ASGI extension with which the app sets the owner of a connection's messages.
EXTENSION = "flux_server.counted"
_TRY_AGAIN_LATER, _POLICY = 1013, 1008


class CountedWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's protocol, extended to count the bytes of incomplete messages towards their owner's share of memory.

    The app sets the owner. Until then, a message may have at most SMALL bytes. The next frame of a message must arrive
    within `gap_seconds`. A frame that arrives slowly ends with uvicorn's ping timeout, because a client cannot answer a
    ping in the middle of a frame.
    """

    gap_seconds = 19.5

    _owner = ""
    _in_flight: BytesInFlight | None = None
    #: Bytes received since the last complete message, and how many of them are held.
    _num_bytes = _num_held = 0
    _gap: asyncio.TimerHandle | None = None

    def handle_connect(self, event: Any) -> None:
        """Connect, and add EXTENSION to the ASGI scope."""
        super().handle_connect(event)
        if hasattr(self, "scope"):
            extensions = cast(dict[str, Any], self.scope["extensions"])
            extensions[EXTENSION] = self._set_owner

    def data_received(self, data: bytes) -> None:
        """Count received bytes. Close the connection if they exceed the owner's share, or SMALL without an owner."""
        self._num_bytes += len(data)
        super().data_received(data)
        num_counted = self._num_bytes if self._num_bytes > SMALL else 0
        if self._in_flight is None:
            if num_counted:
                self._close_with(_POLICY, "")
            return
        if num_counted > self._num_held:
            try:
                self._in_flight.acquire(self._owner, num_counted - self._num_held)
            except TooManyRequests:
                self._close_with(_TRY_AGAIN_LATER, "too much data of this key is in flight; try again later")
                return
            self._num_held = num_counted

    def handle_events(self) -> None:
        """Handle frames, and restart the timer for the next frame of an incomplete message."""
        num_frames = len(self.frames)
        super().handle_events()
        if self.frames and len(self.frames) != num_frames:
            self._cancel_gap_timer()
            self._gap = self.loop.call_later(
                self.gap_seconds, self._close_with, _POLICY, "the next frame of the message did not arrive in time"
            )

    def send_receive_event_to_app(self) -> None:
        """Pass a complete message to the app and release its bytes; the app counts them from here on."""
        super().send_receive_event_to_app()
        self._cancel_gap_timer()
        self._num_bytes = 0
        self._release()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer and release the held bytes."""
        super().connection_lost(exc)
        self._cancel_gap_timer()
        self._release()

    def _set_owner(self, owner: str, in_flight: BytesInFlight) -> None:
        self._owner, self._in_flight = owner, in_flight

    def _cancel_gap_timer(self) -> None:
        if self._gap is not None:
            self._gap.cancel()
            self._gap = None

    def _release(self) -> None:
        if self._in_flight is not None and self._num_held:
            self._in_flight.release(self._owner, self._num_held)
            self._num_held = 0

    def _close_with(self, code: int, reason: str) -> None:
        if not self.close_sent:
            self.conn.fail(code, reason)
            self.handle_parser_exception()


def count_messages(scope: Mapping[str, Any], owner: str, in_flight: BytesInFlight) -> None:
    """Count the messages of the scope's WebSocket towards this owner's share from now on."""
    set_owner: Callable[[str, BytesInFlight], None] | None = scope.get("extensions", {}).get(EXTENSION)
    if set_owner:
        set_owner(owner, in_flight)
