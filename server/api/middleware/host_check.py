"""Middleware that refuses malformed headers and, if the server has no keys, foreign hosts and web pages."""

import ipaddress
import re
from collections import Counter
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.openai.errors import error_response
from server.errors import BadRequest, Forbidden, MisdirectedRequest, NotFound, ServerError
from server.net.fal_hosts import is_fal
from server.settings import Settings

#: Headers that decide about access and must not be repeated, because one part of the server would read the first value
#: and another part the last. The HTTP parser itself refuses a second Content-Length.
_ONCE = (b"host", b"origin", b"authorization")
#: Maximum length of Host, in characters: the host becomes part of stored URLs.
MAX_HOST = 255
HOST = re.compile(r"[A-Za-z0-9._\-]+(:\d+)?|\[[0-9a-fA-F:.]+\](:\d+)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
LOOPBACK_ORIGIN = r"https?://([a-z0-9\-]+\.)?(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?"


class HostCheckMiddleware:
    """Middleware that refuses malformed headers and, if the server has no keys, foreign hosts and web pages.

    Without these checks, a foreign web page or a rebound DNS name could use the GPU of a server without keys, or read
    the server's history.
    """

    def __init__(self, app: ASGIApp, settings: Settings, is_open: bool) -> None:
        self.app = app
        self._settings = settings
        self._is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or call the application."""
        if scope["type"] in ("http", "websocket"):
            try:
                self._check(scope)
            except ServerError as error:
                await error_response(error, _path_here(scope))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers, counts = dict(scope["headers"]), Counter(name for name, _ in scope["headers"])
        for name in _ONCE:
            if counts[name] > 1:
                raise BadRequest(f"The {name.decode().title()} header was sent {counts[name]} times; send it once")
        host = headers.get(b"host", b"").decode("latin-1")
        if len(host) > MAX_HOST:
            raise BadRequest(f"The Host header has {len(host)} characters; it should have at most {MAX_HOST}")
        if not HOST.fullmatch(host):
            raise BadRequest("The Host header is missing, or is not a host name or address with an optional port")
        # Routes are regular expressions, whose `$` also matches before a line feed.
        if _CONTROL.search(scope["path"]):
            raise NotFound(f"Path {scope['path']!r} not found: it contains a control character")
        if not self._is_open:
            return
        if not self._is_allowed_host(hostname_of(host)):
            raise MisdirectedRequest(
                f"The Host header names {host}, which is not this server; set --public-url to allow it"
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        # Any web page that knows the name of an image may show it.
        is_file = scope["path"].startswith("/files/") and scope.get("method") in ("GET", "HEAD")
        if origin and not is_file and not self._is_allowed_origin(origin):
            raise Forbidden(f"Web pages of {origin} may not use this server; set --cors-origin to allow them")

    def _is_allowed_host(self, hostname: str) -> bool:
        if is_fal(hostname) or hostname == "localhost" or hostname.endswith(".localhost"):
            return True
        if self._settings.public_url and hostname == urlsplit(self._settings.public_url).hostname:
            return True
        try:
            return ipaddress.ip_address(hostname).is_loopback
        except ValueError:
            return False

    def _is_allowed_origin(self, origin: str) -> bool:
        return bool(re.fullmatch(LOOPBACK_ORIGIN, origin, re.IGNORECASE)) or origin in allowed_origins(self._settings)


def _path_here(scope: Scope) -> str:
    """Return the request's path under this server's own host names, where /v1 belongs to OpenAI's API instead of fal's.

    RewriteMiddleware, which sees only accepted requests, changes the path of the others in this way.
    """
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    is_fals = any(HOST.fullmatch(host) and is_fal(hostname_of(host)) for host in hosts)
    return f"/platform{scope['path']}" if is_fals else str(scope["path"])


def allowed_origins(settings: Settings) -> tuple[str, ...]:
    """List the web origins, other than loopback, that may call a server without keys: scheme, host and port."""
    if not settings.public_url:
        return settings.cors_origin
    parts = urlsplit(settings.public_url)
    return (*settings.cors_origin, f"{parts.scheme}://{parts.netloc}")


def hostname_of(host: str) -> str:
    """Return the name in a Host header, without the port, in lower case."""
    if host.startswith("["):
        return host[1 : host.index("]")].lower()
    return host.partition(":")[0].lower()
