"""How a client reached us: which role it wants, under which path, and the base of URLs in our answers.

fal has one path for a synchronous run and a queued submit and tells them apart by host. Here both share one
origin, so each request is brought to one form before it is routed: queue paths begin with /queue/.
"""

import ipaddress
import logging
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import wire
from server.errors import BadRequest, BodyTooLarge, InternalError, NotFound, ServerError
from server.events import StreamFailed
from server.fal_hosts import DOMAINS, Role, is_fal, role_of
from server.settings import Settings

log = logging.getLogger(__name__)

#: The longest Host that is accepted, in characters: it becomes part of the URLs in answers, which are kept.
MAX_HOST = 255
#: The longest X-Forwarded-Prefix that is believed, in characters, likewise.
MAX_PREFIX = 255
HOST = re.compile(r"[A-Za-z0-9._\-]+(:\d+)?|\[[0-9a-fA-F:.]+\](:\d+)?")
PROXY_PATH = "/api/fal/proxy"
_TARGET = b"x-fal-target-url"
#: Paths that belong to no role, whatever the host is called.
_OWN_PATHS = ("/files/", "/health", "/docs", "/openapi.json", "/api/", "/v1/", "/platform/")
#: The operator's and the playground's, which are no part of fal's API.
_PAGES = ("/status", "/metrics", "/playground", "/static/", "/platform/")
#: Where fal's platform API is, whose paths are others under every other name: OpenAI's are /v1/models too.
PLATFORM = "/platform"
#: What there is under the website's name.
_SITE_PATHS = ("/api/openapi/", "/models/")
#: Requests that carry a file and bound it themselves.
_UPLOADS = re.compile(r"PUT /storage/upload/.+|PUT /files/[^/]+/multipart/.+|POST /files/upload")


class Address:
    """ASGI middleware: brings the request to its one form, bounds its body, and turns failures into answers."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._settings = settings
        self._max_body = settings.max_body_mib * 2**20
        self._trusted = [ipaddress.ip_network(network, strict=False) for network in settings.trusted_proxies]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on in one form; answer what fails before or behind."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        has_started = False

        async def sender(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            headers = dict(scope["headers"])
            scope = self._readdress(scope, headers)
            if not _UPLOADS.fullmatch(f"{scope.get('method')} {scope['path']}"):
                receive = self._bounded(receive, headers)
            await self.app(scope, receive, sender)
        except ServerError as error:
            await wire.error(error)(scope, receive, send)
        except ClientDisconnect:
            # It left in the middle of its body; there is nobody to answer.
            return
        except StreamFailed:
            # The answer stays without its end, which every client takes for the error that it is.
            return
        except Exception:
            log.exception("%s %s failed", scope.get("method"), scope["path"])
            if has_started:
                raise
            await wire.error(InternalError())(scope, receive, send)

    def _bounded(self, receive: Receive, headers: Mapping[bytes, bytes]) -> Receive:
        """Receive no more than the operator allows. FastAPI's own cap stands outside CORS and answers in plain text."""
        too_large = BodyTooLarge(f"The body is larger than {self._max_body} bytes")
        if int(headers.get(b"content-length", b"0")) > self._max_body:
            raise too_large
        received = 0

        async def receiver() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:
                raise too_large
            return message

        return receiver

    def _readdress(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Scope:
        """The scope with the path in its one form, and with `base_url` in its state."""
        scheme, host, prefix = self._reached(scope, headers)
        path, query, is_queue = scope["path"], scope["query_string"], False
        hostname, asked = hostname_of(host), path
        if path.rstrip("/") == PROXY_PATH and scope.get("method") != "OPTIONS":
            asked, query, hostname = _target(headers)
            path = _fal_path(hostname, asked, is_told=True)
            is_queue = role_of(hostname) == Role.QUEUE
        elif is_fal(hostname):
            path = _fal_path(hostname, path)
            is_queue = role_of(hostname) == Role.QUEUE or (
                role_of(hostname) == Role.RUN and b"_subdomain=queue" in query.split(b"&")
            )
        elif not path.startswith(_OWN_PATHS):
            is_queue = hostname.startswith("queue.") or b"_subdomain=queue" in query.split(b"&")
        path = path.rstrip("/") or "/"
        # "/requests/" can only mean the queue, so a client with one base URL for everything is served too.
        if (is_queue or "/requests/" in path) and not path.startswith(("/queue/", *_OWN_PATHS)):
            path = f"/queue{path}"
        base_url = self._public_base(scope) if is_fal(hostname_of(host)) else f"{scheme}://{host}{prefix}"
        fal_url = f"https://{hostname}{asked}" if is_fal(hostname) else ""
        state = {**scope.get("state", {}), "base_url": base_url, "fal_url": fal_url}
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
            if not HOST.fullmatch(host) or scheme not in ("http", "https"):
                raise BadRequest("The X-Forwarded headers are malformed")
            if len(host) > MAX_HOST or len(prefix) > MAX_PREFIX:
                limits = f"X-Forwarded-Host at most {MAX_HOST} characters, X-Forwarded-Prefix at most {MAX_PREFIX}"
                raise BadRequest(f"The X-Forwarded headers are too long: {limits}")
        return scheme, host, prefix

    def _public_base(self, scope: Scope) -> str:
        """Where files and status are found by a client that calls us by a fal name."""
        port = scope["server"][1] if scope["scheme"] == "http" else self._settings.port
        return self._settings.public_url or f"http://127.0.0.1:{port}"


def hostname_of(host: str) -> str:
    """The name in a Host header, without the port, in small letters."""
    if host.startswith("["):
        return host[1 : host.index("]")].lower()
    return host.partition(":")[0].lower()


def _fal_path(hostname: str, path: str, *, is_told: bool = False) -> str:
    """The path here of one under a name of fal's. Raises NotFound where nothing is offered under it.

    `is_told` where the name is not the Host but what a proxied request is meant for: then this server's own paths are
    meant by nobody.
    """
    role, own = role_of(hostname), (*_PAGES, *(_OWN_PATHS if is_told else ()))
    if role == Role.PLATFORM:
        return f"{PLATFORM}{path}"
    is_offered = path.startswith(_SITE_PATHS) if role == Role.SITE else not path.startswith(own)
    if role is None or not path.strip("/") or not is_offered:
        raise not_offered(f"https://{hostname}{path}")
    return path


def not_offered(url: str) -> NotFound:
    """For a request that fal may answer, and that must not reach fal."""
    return NotFound(f"{url} is not offered by this server")


def _target(headers: Mapping[bytes, bytes]) -> tuple[str, bytes, str]:
    """Path, query and host of the proxied URL: read, never fetched."""
    target = headers.get(_TARGET, b"").decode("latin-1")
    if not target:
        raise BadRequest("The x-fal-target-url header is missing")
    try:
        parts = urlsplit(target)
        hostname = (parts.hostname or "").rstrip(".")
    except ValueError:
        raise BadRequest("The x-fal-target-url header is not a URL") from None
    if parts.scheme != "https" or not is_fal(hostname):
        raise BadRequest(f"x-fal-target-url should be an https URL under {', '.join(DOMAINS)}")
    return parts.path, parts.query.encode("latin-1"), hostname


def _first(headers: Mapping[bytes, bytes], name: bytes, default: str) -> str:
    """The first of a list of forwarded values: the one nearest to the client."""
    value = headers.get(name)
    return value.decode("latin-1").split(",")[0].strip() if value else default
