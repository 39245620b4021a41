"""Middleware that adds a request id to every response and to the log lines of its request."""

import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from server.api.openai.paths import is_openai_path

HEADER = "x-fal-request-id"
#: OpenAI's name for the same, which its packages read as `_request_id`.
OPENAI_HEADER = "x-request-id"


class RequestIdMiddleware:
    """Middleware that adds x-fal-request-id, which @fal-ai/client reads as `requestId`, unless a route has set it.

    Under /v1, the header x-request-id gets the same value.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application, and add the header when the response starts."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request_id = str(uuid.uuid4())

        async def sender(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message.get("headers", [])))
                headers.setdefault(HEADER, request_id)
                if is_openai_path(scope["path"]):
                    headers[OPENAI_HEADER] = headers[HEADER]
                message = {**message, "headers": headers.raw}
            await send(message)

        with bound_contextvars(request_id=request_id):
            await self.app(scope, receive, sender)
