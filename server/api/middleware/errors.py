"""Error responses for the server's exceptions, the framework's, and all others, in fal's shape or in OpenAI's."""

import logging

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import responses
from server.api.openai.errors import error_response
from server.api.openai.paths import is_openai_path
from server.api.sse import AbortStream
from server.errors import InternalError, MethodNotAllowed, NotFound, ServerError, not_offered
from server.storage.database import CorruptDatabase

log = logging.getLogger(__name__)


class ErrorMiddleware:
    """Middleware that handles errors of the middleware inside it, and errors without an exception handler."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application. If it fails before the response has started, send an error response.

        Raises an unexpected error again if the response has started.
        """
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
            await error_response(error, scope["path"])(scope, receive, send)
        except ClientDisconnect:
            # The client disconnected while it sent the body, so a response would reach no one.
            return
        except AbortStream:
            # The response ends without its last chunk, which every client treats as an error.
            return
        except Exception:
            # Log the route instead of the path, which may contain the secret name of a file.
            route = getattr(scope.get("route"), "path", "request")
            log.exception("%s %s failed", scope.get("method", "WebSocket"), route)
            if has_started:
                raise
            await error_response(InternalError(), scope["path"])(scope, receive, send)


def add_exception_handlers(app: FastAPI) -> None:
    """Add handlers that turn errors from routes into responses."""
    app.add_exception_handler(ServerError, _server_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(CorruptDatabase, _damaged)


async def _server_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    return error_response(error, request.url.path)


async def _damaged(request: Request, error: Exception) -> Response:
    """Respond with a generic error. The backend has logged the reason, and the server is about to stop."""
    return error_response(InternalError(), request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    """Convert one of Starlette's errors, such as 404 or 405, to the shape of the path's API."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404 or (error.status_code == 405 and not _is_known(request)):
        url = request.state.fal_url
        return error_response(not_offered(url) if url else NotFound(f"Path {path} not found"), path)
    response = (
        error_response(MethodNotAllowed(), path)
        if error.status_code == 405
        else responses.FalJSONResponse({"detail": error.detail})
    )
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response


def _is_known(request: Request) -> bool:
    """Return whether a path exists, also with another method.

    Some routes match every path, but only one method, so Starlette reports 405 instead of 404 for an unknown path.
    """
    path = request.url.path
    return is_openai_path(path) or "/requests/" in path or _endpoint(path) in request.app.state.services.models


def _endpoint(path: str) -> str:
    return path.removeprefix("/queue").removesuffix("/stream").strip("/")
