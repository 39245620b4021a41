"""How a client reached us: which role it wants, under which path, and the base of URLs in our answers.

fal has one path for a synchronous run and a queued submit and tells them apart by host. Here both share one
origin, so each request is brought to one form before it is routed: queue paths begin with /queue/.
"""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.middleware.host_check import HOST, MAX_HOST, hostname_of
from server.errors import BadRequest, not_offered
from server.net.fal_hosts import DOMAINS, Role, is_fal, role_of
from server.settings import Settings

#: The longest X-Forwarded-Prefix that is believed, in characters, likewise.
MAX_PREFIX = 255
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


class RewriteMiddleware:
    """Brings each request to its one form."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._settings = settings
        self._trusted = [ipaddress.ip_network(network, strict=False) for network in settings.trusted_proxies]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Change the scope in place, as uvicorn's ProxyHeadersMiddleware does, and pass on."""
        if scope["type"] in ("http", "websocket"):
            self._rewrite(scope, dict(scope["headers"]))
        await self.app(scope, receive, send)

    def _rewrite(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """Bring the path into its one form, and put `base_url` and `fal_url` into the state. Raises BadRequest."""
        scheme, host, prefix = self._origin(scope, headers)
        path, query, is_queue = scope["path"], scope["query_string"], False
        hostname, asked = hostname_of(host), path
        if path.rstrip("/") == PROXY_PATH and scope.get("method") != "OPTIONS":
            asked, query, hostname = _proxy_target(headers)
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
        # A copy, because a server may share one state between connections.
        scope["state"] = {**scope.get("state", {}), "base_url": base_url, "fal_url": fal_url}
        scope["path"], scope["raw_path"], scope["query_string"] = path, path.encode(), query

    def _origin(self, scope: Scope, headers: Mapping[bytes, bytes]) -> tuple[str, str, str]:
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


def _proxy_target(headers: Mapping[bytes, bytes]) -> tuple[str, bytes, str]:
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
