"""Middleware that normalizes paths and determines the base of URLs in responses.

fal uses one path for a synchronous run and a queued submit, and distinguishes them by host. Here runs and submits share
one origin, so the middleware normalizes each path before routing: paths of the queue start with /queue/.
"""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.middleware.host_check import HOST, MAX_HOST, hostname_of
from server.errors import BadRequest, not_offered
from server.net.fal_hosts import DOMAINS, Role, is_fal, role_of
from server.settings import Settings

#: Maximum length of X-Forwarded-Prefix, in characters: the prefix becomes part of stored URLs.
MAX_PREFIX = 255
PROXY_PATH = "/api/fal/proxy"
_TARGET = b"x-fal-target-url"
_VALID_TARGET = f"an https URL under {', '.join(DOMAINS)}"
#: Paths that mean the same under every host name, so they never get the prefix /queue.
_OWN_PATHS = ("/files/", "/health", "/docs", "/openapi.json", "/api/", "/v1/", "/sdapi/", "/platform/")
#: Paths that are not part of fal's API, so they are not offered under fal's host names.
_PAGES = ("/status", "/metrics", "/playground", "/static/", "/platform/")
#: Prefix of fal's platform API. Without it, /v1/models would collide with OpenAI's path.
PLATFORM = "/platform"
#: Paths offered under the host name of fal's website.
_SITE_PATHS = ("/api/openapi/", "/models/")


class RewriteMiddleware:
    """Middleware that rewrites each request's path to its normalized form, which the routes match."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._settings = settings
        self._trusted = [ipaddress.ip_network(network, strict=False) for network in settings.trusted_proxies]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Change the scope in place, as uvicorn's ProxyHeadersMiddleware does, and call the application."""
        if scope["type"] in ("http", "websocket"):
            self._rewrite(scope, dict(scope["headers"]))
        await self.app(scope, receive, send)

    def _rewrite(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """Normalize the path, and store `base_url` and `fal_url` in the state. Raises BadRequest and NotFound.

        `base_url` is the base of URLs in responses. `fal_url` is the fal URL that the client requested, or "".
        """
        scheme, host, prefix = self._origin(scope, headers)
        path, query, is_queue = scope["path"], scope["query_string"], False
        hostname, original_path = hostname_of(host), path
        if path.rstrip("/") == PROXY_PATH and scope.get("method") != "OPTIONS":
            original_path, query, hostname = _proxy_target(headers)
            path = _fal_path(hostname, original_path, is_proxied=True)
            is_queue = role_of(hostname) == Role.QUEUE
        elif is_fal(hostname):
            path = _fal_path(hostname, path)
            is_queue = role_of(hostname) == Role.QUEUE or (
                role_of(hostname) == Role.RUN and b"_subdomain=queue" in query.split(b"&")
            )
        elif not path.startswith(_OWN_PATHS):
            is_queue = hostname.startswith("queue.") or b"_subdomain=queue" in query.split(b"&")
        path = path.rstrip("/") or "/"
        # A path with "/requests/" always belongs to the queue. This serves clients that have only one base URL.
        if (is_queue or "/requests/" in path) and not path.startswith(("/queue/", *_OWN_PATHS)):
            path = f"/queue{path}"
        base_url = self._public_base(scope) if is_fal(hostname_of(host)) else f"{scheme}://{host}{prefix}"
        fal_url = f"https://{hostname}{original_path}" if is_fal(hostname) else ""
        # Copy the state, because an ASGI server may share it between connections.
        scope["state"] = {**scope.get("state", {}), "base_url": base_url, "fal_url": fal_url}
        scope["path"], scope["raw_path"], scope["query_string"] = path, path.encode(), query

    def _origin(self, scope: Scope, headers: Mapping[bytes, bytes]) -> tuple[str, str, str]:
        """Return the scheme, host and prefix that the client used, as reported by a trusted proxy if there is one."""
        scheme = str(scope["scheme"]).replace("ws", "http")
        host, prefix = headers[b"host"].decode("latin-1"), ""
        client: tuple[str, int] | None = scope.get("client")
        if self._trusted and client and any(ipaddress.ip_address(client[0]) in network for network in self._trusted):
            scheme = _first(headers, b"x-forwarded-proto", scheme)
            host = _first(headers, b"x-forwarded-host", host)
            prefix = _first(headers, b"x-forwarded-prefix", "").rstrip("/")
            if not HOST.fullmatch(host) or scheme not in ("http", "https"):
                raise BadRequest(
                    "X-Forwarded-Proto should be http or https, and X-Forwarded-Host a host name or address"
                )
            if len(host) > MAX_HOST or len(prefix) > MAX_PREFIX:
                raise BadRequest(
                    f"X-Forwarded-Host should have at most {MAX_HOST} characters,"
                    f" and X-Forwarded-Prefix at most {MAX_PREFIX}"
                )
        return scheme, host, prefix

    def _public_base(self, scope: Scope) -> str:
        """Return the base of URLs for a client that uses a fal host name."""
        port = scope["server"][1] if scope["scheme"] == "http" else self._settings.port
        return self._settings.public_url or f"http://127.0.0.1:{port}"


def _fal_path(hostname: str, path: str, *, is_proxied: bool = False) -> str:
    """Map a path under a fal host name to a path here. Raises NotFound if this server does not offer it.

    With `is_proxied`, the host name comes from the target URL of a proxied request, so the path cannot be one of this
    server's own.
    """
    role, own = role_of(hostname), (*_PAGES, *(_OWN_PATHS if is_proxied else ()))
    if role == Role.PLATFORM:
        return f"{PLATFORM}{path}"
    is_offered = path.startswith(_SITE_PATHS) if role == Role.SITE else not path.startswith(own)
    if role is None or not path.strip("/") or not is_offered:
        raise not_offered(f"https://{hostname}{path}")
    return path


def _proxy_target(headers: Mapping[bytes, bytes]) -> tuple[str, bytes, str]:
    """Parse path, query and host of the proxied URL, which is never fetched. Raises BadRequest."""
    target = headers.get(_TARGET, b"").decode("latin-1")
    if not target:
        raise BadRequest("The x-fal-target-url header is missing; set it to the fal URL that the request is for")
    try:
        parts = urlsplit(target)
        hostname = (parts.hostname or "").rstrip(".")
    except ValueError:
        raise BadRequest(f"The x-fal-target-url header is not a valid URL; send {_VALID_TARGET}") from None
    if parts.scheme != "https" or not is_fal(hostname):
        raise BadRequest(f"The x-fal-target-url header is not {_VALID_TARGET}")
    return parts.path, parts.query.encode("latin-1"), hostname


def _first(headers: Mapping[bytes, bytes], name: bytes, default: str) -> str:
    """Return the first of a header's values, which comes from the proxy nearest to the client; `default` if missing."""
    value = headers.get(name)
    return value.decode("latin-1").split(",")[0].strip() if value else default
