"""How a client reached us: which role it wants, under which path, and the base of URLs in our answers.

fal has one path for a synchronous run and a queued submit and tells them apart by host. Here both share one
origin, so each request is brought to one form before it is routed: queue paths begin with /queue/.
"""

import ipaddress
import logging
import re
import uuid
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import wire
from server.errors import BadRequest, Forbidden, InternalError, Misdirected, NotFound, ServerError
from server.events import StreamFailed
from server.settings import Settings

log = logging.getLogger(__name__)

RUN_HOSTS = frozenset({"fal.run", "falrun.com", "ws.fal.run"})
QUEUE_HOSTS = frozenset({"queue.fal.run", "queue.falrun.com"})
REST_HOSTS = frozenset({"rest.fal.ai", "rest.alpha.fal.ai", "fal.media", "v3.fal.media"})
FAL_HOSTS = RUN_HOSTS | QUEUE_HOSTS | REST_HOSTS

PROXY_PATH = "/api/fal/proxy"
_TARGET = b"x-fal-target-url"
_HOST = re.compile(r"[A-Za-z0-9._\-]+(:\d+)?|\[[0-9a-fA-F:.]+\](:\d+)?")
LOOPBACK_ORIGIN = r"https?://([a-z0-9\-]+\.)?(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?"
#: Paths that belong to no role, whatever the host is called.
_OWN_PATHS = ("/files/", "/health", "/docs", "/openapi.json", "/api/")


class Doorway:
    """ASGI middleware: admits, readdresses, and puts x-fal-request-id on every answer."""

    def __init__(self, app: ASGIApp, settings: Settings, is_open: bool) -> None:
        self.app = app
        self._settings = settings
        # Without keys, a foreign web page or a rebound name could otherwise use the GPU.
        self._is_open = is_open
        self._trusted = [ipaddress.ip_network(network, strict=False) for network in settings.trusted_proxies]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused here; pass on the rest in one form."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        sender = _Sender(send)
        try:
            headers = dict(scope["headers"])
            self._admit(scope, headers)
            scope = self._readdress(scope, headers)
            await self.app(scope, receive, sender)
        except ServerError as error:
            await wire.error(error)(scope, receive, sender)
        except StreamFailed:
            # The answer stays without its end, which every client takes for the error that it is.
            return
        except Exception:
            log.exception("%s %s failed", scope.get("method"), scope["path"])
            if sender.has_started:
                raise
            await wire.error(InternalError())(scope, receive, sender)

    def _admit(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        if not _HOST.fullmatch(host):
            raise BadRequest("The Host header is missing or malformed")
        if not self._is_open:
            return
        if not self._is_own(_hostname(host)):
            raise Misdirected(f"{host} is not a name of this server; --public-url can make it one")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and not scope["path"].startswith("/files/") and not self._is_own_origin(origin):
            raise Forbidden(f"Web pages of {origin} may not use this server; --cors-origin can permit it")

    def _is_own(self, hostname: str) -> bool:
        if hostname in FAL_HOSTS or hostname == "localhost" or hostname.endswith(".localhost"):
            return True
        if self._settings.public_url and hostname == urlsplit(self._settings.public_url).hostname:
            return True
        try:
            return ipaddress.ip_address(hostname).is_loopback
        except ValueError:
            return False

    def _is_own_origin(self, origin: str) -> bool:
        return bool(re.fullmatch(LOOPBACK_ORIGIN, origin)) or origin in allowed_origins(self._settings)

    def _readdress(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Scope:
        """The scope with the path in its one form, and with `base_url` in its state."""
        scheme, host, prefix = self._reached(scope, headers)
        path, query, is_queue = scope["path"], scope["query_string"], False
        hostname = _hostname(host)
        if path.rstrip("/") == PROXY_PATH and scope.get("method") != "OPTIONS":
            path, query, hostname = _target(headers)
            is_queue = hostname in QUEUE_HOSTS
        elif not path.startswith(_OWN_PATHS):
            is_queue = hostname.startswith("queue.") or b"_subdomain=queue" in query.split(b"&")
        path = path.rstrip("/") or "/"
        # "/requests/" can only mean the queue, so a client with one base URL for everything is served too.
        if (is_queue or "/requests/" in path) and not path.startswith(("/queue/", *_OWN_PATHS)):
            path = f"/queue{path}"
        base_url = self._public_base(scope) if _hostname(host) in FAL_HOSTS else f"{scheme}://{host}{prefix}"
        state = {**scope.get("state", {}), "base_url": base_url}
        return {**scope, "path": path, "raw_path": path.encode(), "query_string": query, "state": state}

    def _reached(self, scope: Scope, headers: Mapping[bytes, bytes]) -> tuple[str, str, str]:
        """Scheme, host and prefix that the client used; those of a trusted proxy in front if there is one."""
        scheme = str(scope["scheme"]).replace("ws", "http")
        host, prefix = headers[b"host"].decode("latin-1"), ""
        client: tuple[str, int] | None = scope.get("client")
        if self._trusted and client and any(ipaddress.ip_address(client[0]) in network for network in self._trusted):
            scheme = _first(headers, b"x-forwarded-proto", scheme)
            host = _first(headers, b"x-forwarded-host", host)
            prefix = _first(headers, b"x-forwarded-prefix", "").rstrip("/")
            if not _HOST.fullmatch(host) or scheme not in ("http", "https"):
                raise BadRequest("The X-Forwarded headers are malformed")
        return scheme, host, prefix

    def _public_base(self, scope: Scope) -> str:
        """Where files and status are found by a client that calls us by a fal name."""
        port = scope["server"][1] if scope["scheme"] == "http" else self._settings.port
        return self._settings.public_url or f"http://127.0.0.1:{port}"


class _Sender:
    """Sends, with the header that @fal-ai/client takes its requestId from."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            headers = message.setdefault("headers", [])
            if not any(name.lower() == b"x-fal-request-id" for name, _ in headers):
                message = {**message, "headers": [*headers, (b"x-fal-request-id", str(uuid.uuid4()).encode())]}
        await self._send(message)


def allowed_origins(settings: Settings) -> tuple[str, ...]:
    """Web origins that may call, beside loopback, when there is no key."""
    return (*settings.cors_origin, *((settings.public_url,) if settings.public_url else ()))


def _target(headers: Mapping[bytes, bytes]) -> tuple[str, bytes, str]:
    """Path, query and host of the proxied URL: read, never fetched."""
    target = headers.get(_TARGET, b"").decode("latin-1")
    if not target:
        raise BadRequest("The x-fal-target-url header is missing")
    try:
        parts = urlsplit(target)
        hostname = parts.hostname or ""
    except ValueError:
        raise BadRequest("The x-fal-target-url header is not a URL") from None
    if parts.scheme != "https" or hostname not in FAL_HOSTS:
        raise BadRequest(f"x-fal-target-url may name {', '.join(sorted(FAL_HOSTS))} only")
    if not parts.path.startswith("/") or parts.path.startswith(_OWN_PATHS):
        raise NotFound(f"Path {parts.path} not found")
    return parts.path, parts.query.encode("latin-1"), hostname


def _hostname(host: str) -> str:
    if host.startswith("["):
        return host[1 : host.index("]")].lower()
    return host.partition(":")[0].lower()


def _first(headers: Mapping[bytes, bytes], name: bytes, default: str) -> str:
    """The first of a list of forwarded values: the one nearest to the client."""
    value = headers.get(name)
    return value.decode("latin-1").split(",")[0].strip() if value else default
