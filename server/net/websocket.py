"""WebSockets whose messages count: uvicorn gathers each whole, so many large ones that never end would fill memory."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from server.errors import TooManyRequests
from server.net.bytes_in_flight import SMALL, BytesInFlight

#: Where the app finds what to say whose messages these are.
EXTENSION = "flux_server.counted"
_TRY_AGAIN_LATER, _POLICY = 1013, 1008


class CountedWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's own. What has come of a message counts as its owner's; there is no owner until the app says so.

    A message must come in time: uvicorn's pings see to each frame, in the middle of which a client can answer none, and
    between two frames of one message `gap_seconds` may pass.
    """

    gap_seconds = 19.5

    _owner = ""
    _in_flight: BytesInFlight | None = None
    #: Bytes since the last whole message, and how many of them are held.
    _num_bytes = _num_held = 0
    _gap: asyncio.TimerHandle | None = None

    def handle_connect(self, event: Any) -> None:
        """As uvicorn's, and with the extension in the scope."""
        super().handle_connect(event)
        if hasattr(self, "scope"):
            extensions = cast(dict[str, Any], self.scope["extensions"])
            extensions[EXTENSION] = self._set_owner

    def data_received(self, data: bytes) -> None:
        """A part of a message, or several."""
        self._num_bytes += len(data)
        super().data_received(data)
        wanted = self._num_bytes if self._num_bytes > SMALL else 0
        if self._in_flight is None:
            if wanted:
                self._close_with(_POLICY, "")
            return
        if wanted > self._num_held:
            try:
                self._in_flight.acquire(self._owner, wanted - self._num_held)
            except TooManyRequests:
                self._close_with(_TRY_AGAIN_LATER, "too much of this key is on its way; try again later")
                return
            self._num_held = wanted

    def handle_events(self) -> None:
        """After these, the next frame of a message that is not whole is waited for."""
        num_frames = len(self.frames)
        super().handle_events()
        if self.frames and len(self.frames) != num_frames:
            self._cancel_gap_timer()
            self._gap = self.loop.call_later(self.gap_seconds, self._close_with, _POLICY, "the message did not go on")

    def send_receive_event_to_app(self) -> None:
        """The message is whole; from here on the app counts it."""
        super().send_receive_event_to_app()
        self._cancel_gap_timer()
        self._num_bytes = 0
        self._release()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is held any more."""
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
    """From now on this connection's messages count as this owner's."""
    belongs_to: Callable[[str, BytesInFlight], None] | None = scope.get("extensions", {}).get(EXTENSION)
    if belongs_to:
        belongs_to(owner, in_flight)
