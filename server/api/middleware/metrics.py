"""Middleware that counts HTTP responses by method, route and status."""

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics import Metrics

log = logging.getLogger(__name__)

_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")


class MetricsMiddleware:
    """The outermost middleware, which counts responses.

    Paths without a route share one label, so that clients cannot fill the memory with labels.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application, and count the response when it starts."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in _METHODS else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The router has stored the route in this scope, because all middleware passes on the same dictionary.
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.http_requests.labels(method, route, str(message["status"])).inc()
                # The path is not logged, because it may contain the secret name of a file.
                log.debug("%s %s %d", method, route, message["status"])
            await send(message)

        await self.app(scope, receive, counting)
