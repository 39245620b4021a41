"""Every HTTP answer is counted, by the route that gave it; also those that no route gave."""

import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics import Metrics

log = logging.getLogger(__name__)

_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
_PLACE = "routed"


class Counted:
    """ASGI middleware, the outermost. Paths that clients make up count as one, or they could fill the memory."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and count when the answer begins."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        routed: list[Scope] = []

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                method = scope["method"] if scope["method"] in _METHODS else "other"
                route = getattr(routed[0].get("route"), "path", "none") if routed else "none"
                self._metrics.http_requests.labels(method, route, str(message["status"])).inc()
                # Not the path, which may be a picture's secret name.
                log.debug("%s %s %d", method, route, message["status"])
            await send(message)

        state: dict[str, Any] = {**scope.get("state", {}), _PLACE: routed}
        await self.app({**scope, "state": state}, receive, counting)


class Routed:
    """ASGI middleware, the innermost: shows `Counted` the scope that the route is written into."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        scope.get("state", {}).get(_PLACE, []).append(scope)
        await self.app(scope, receive, send)
