"""Middleware that limits the size of request bodies."""

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import BodyTooLarge

#: Requests whose body is an uploaded file, which --max-upload-mib limits instead.
_UPLOADS = re.compile(r"PUT /storage/upload/.+|PUT /files/[^/]+/multipart/.+|POST /files/upload")


class BodyLimitMiddleware:
    """Middleware that raises BodyTooLarge for a body of more than `max_bytes`.

    FastAPI's built-in limit is not used, because it runs outside the CORS middleware and responds in plain text.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application. Raises BodyTooLarge for a large Content-Length, or when too many bytes have arrived."""
        is_bounded = scope["type"] in ("http", "websocket") and not _UPLOADS.fullmatch(
            f"{scope.get('method')} {scope['path']}"
        )
        await self.app(scope, self._bounded(scope, receive) if is_bounded else receive, send)

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        too_large = BodyTooLarge(f"The body is larger than {self._max_bytes} bytes")
        if int(dict(scope["headers"]).get(b"content-length", b"0")) > self._max_bytes:
            raise too_large
        received = 0

        async def receiver() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise too_large
            return message

        return receiver
