"""Counts every HTTP response by the route that gave it, also those that no route gave."""

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics import Metrics

log = logging.getLogger(__name__)

_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")


class MetricsMiddleware:
    """The outermost middleware. All paths without a route count as one, or clients could fill the memory with them."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and count when the response begins."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # RewriteMiddleware may change it.
        method = scope["method"] if scope["method"] in _METHODS else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The router writes the route into the scope, which is the same dictionary all the way in.
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.http_requests.labels(method, route, str(message["status"])).inc()
                # The path is not logged, because it may be the secret name of a file.
                log.debug("%s %s %d", method, route, message["status"])
            await send(message)

        await self.app(scope, receive, counting)
