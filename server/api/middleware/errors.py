"""Turns exceptions into responses in fal's shape: the server's own errors, the framework's, and everything else."""

import logging

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import responses
from server.api.sse import AbortStream
from server.errors import InternalError, MethodNotAllowed, NotFound, ServerError, not_offered
from server.storage.database import CorruptDatabase

log = logging.getLogger(__name__)


class ErrorMiddleware:
    """Answers what is raised before a route is found, and what no exception handler takes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and answer what fails."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        has_started = False

        async def sender(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self.app(scope, receive, sender)
        except ServerError as error:
            await responses.error_response(error)(scope, receive, send)
        except ClientDisconnect:
            # The client left in the middle of its body, so no one is there to answer.
            return
        except AbortStream:
            # The response stays without its end, which every client takes for the error that it is.
            return
        except Exception:
            log.exception("%s %s failed", scope.get("method"), scope["path"])
            if has_started:
                raise
            await responses.error_response(InternalError())(scope, receive, send)


def add_exception_handlers(app: FastAPI) -> None:
    """Answer what routes raise in fal's shape."""
    app.add_exception_handler(ServerError, _server_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(CorruptDatabase, _damaged)


async def _server_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    return responses.error_response(error)


async def _damaged(request: Request, error: Exception) -> Response:
    """Why is in the log, once; the server ends."""
    return responses.error_response(InternalError())


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors, in fal's words."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    # The routes that take any endpoint make every unknown path look like a known one with the wrong verb.
    is_known = "/requests/" in path or _endpoint(path) in request.app.state.services.models
    if error.status_code == 404 or (error.status_code == 405 and not is_known):
        url = request.state.fal_url
        return responses.error_response(not_offered(url) if url else NotFound(f"Path {path} not found"))
    response = (
        responses.error_response(MethodNotAllowed())
        if error.status_code == 405
        else responses.FalJSONResponse({"detail": error.detail})
    )
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response


def _endpoint(path: str) -> str:
    return path.removeprefix("/queue").removesuffix("/stream").strip("/")
