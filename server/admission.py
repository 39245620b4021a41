"""Who may come in at all: the outermost layer, before a request is read or routed."""

import ipaddress
import re
import uuid
from collections import Counter
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from server import wire
from server.address import HOST, MAX_HOST, hostname_of
from server.errors import BadRequest, Forbidden, Misdirected, NotFound, ServerError
from server.fal_hosts import is_fal
from server.settings import Settings

#: What decides who may come in. Of two of a kind, one part of the server would read the first and another the last; the
#: parser itself refuses a second Content-Length.
_ONCE = (b"host", b"origin", b"authorization")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
LOOPBACK_ORIGIN = r"https?://([a-z0-9\-]+\.)?(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?"


class Admission:
    """ASGI middleware: refuses foreign hosts and pages when there is no key, and names every answer.

    Without keys, a foreign web page or a rebound DNS name could otherwise use the GPU or read the history.
    """

    def __init__(self, app: ASGIApp, settings: Settings, is_open: bool) -> None:
        self.app = app
        self._settings = settings
        self._is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request_id = str(uuid.uuid4())
        # What is logged meanwhile says it too; what belongs to a job says the job's.
        with bound_contextvars(request_id=request_id):
            try:
                self._admit(scope)
            except ServerError as error:
                await wire.error(error)(scope, receive, _identified(send, request_id))
            else:
                await self.app(scope, receive, _identified(send, request_id))

    def _admit(self, scope: Scope) -> None:
        headers, numbers = dict(scope["headers"]), Counter(name for name, _ in scope["headers"])
        for name in _ONCE:
            if numbers[name] > 1:
                raise BadRequest(f"The {name.decode().title()} header came {numbers[name]} times; send it once")
        host = headers.get(b"host", b"").decode("latin-1")
        if len(host) > MAX_HOST:
            raise BadRequest(f"The Host header has {len(host)} characters; it should have at most {MAX_HOST}")
        if not HOST.fullmatch(host):
            raise BadRequest("The Host header is missing or malformed")
        # Routes are found by regular expressions, whose end is also before a line feed.
        if _CONTROL.search(scope["path"]):
            raise NotFound(f"Path {scope['path']!r} not found: it has a control character")
        if not self._is_open:
            return
        if not self._is_own(hostname_of(host)):
            raise Misdirected(f"{host} is not a name of this server; --public-url can make it one")
        origin = headers.get(b"origin", b"").decode("latin-1")
        # A picture may be shown by any page that was told its name.
        shows = scope["path"].startswith("/files/") and scope.get("method") in ("GET", "HEAD")
        if origin and not shows and not self._is_own_origin(origin):
            raise Forbidden(f"Web pages of {origin} may not use this server; --cors-origin can permit it")

    def _is_own(self, hostname: str) -> bool:
        if is_fal(hostname) or hostname == "localhost" or hostname.endswith(".localhost"):
            return True
        if self._settings.public_url and hostname == urlsplit(self._settings.public_url).hostname:
            return True
        try:
            return ipaddress.ip_address(hostname).is_loopback
        except ValueError:
            return False

    def _is_own_origin(self, origin: str) -> bool:
        return bool(re.fullmatch(LOOPBACK_ORIGIN, origin, re.IGNORECASE)) or origin in allowed_origins(self._settings)


def allowed_origins(settings: Settings) -> tuple[str, ...]:
    """Web origins that may call, beside loopback, when there is no key: scheme and host, never a path."""
    if not settings.public_url:
        return settings.cors_origin
    parts = urlsplit(settings.public_url)
    return (*settings.cors_origin, f"{parts.scheme}://{parts.netloc}")


def _identified(send: Send, request_id: str) -> Send:
    """Send with the header that @fal-ai/client takes its requestId from, whatever the answer is."""

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = message.get("headers", [])
            if not any(name.lower() == b"x-fal-request-id" for name, _ in headers):
                message = {**message, "headers": [*headers, (b"x-fal-request-id", request_id.encode())]}
        await send(message)

    return sender
