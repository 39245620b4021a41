"""What becomes an answer in fal's words: the server's own errors, and the framework's."""

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from server import wire
from server.address import not_offered
from server.database import Damaged
from server.errors import InternalError, MethodNotAllowed, NotFound, ServerError


def answer(app: FastAPI) -> None:
    """Answer them so from now on."""
    app.add_exception_handler(ServerError, _server_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Damaged, _damaged)


async def _server_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    return wire.error(error)


async def _damaged(request: Request, error: Exception) -> Response:
    """Why is in the log, once; the server ends."""
    return wire.error(InternalError())


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors, in fal's words."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    # The routes that take any endpoint make every unknown path look like a known one with the wrong verb.
    is_known = "/requests/" in path or _endpoint(path) in request.app.state.parts.models
    if error.status_code == 404 or (error.status_code == 405 and not is_known):
        url = request.state.fal_url
        return wire.error(not_offered(url) if url else NotFound(f"Path {path} not found"))
    response = wire.error(MethodNotAllowed()) if error.status_code == 405 else wire.JSON({"detail": error.detail})
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response


def _endpoint(path: str) -> str:
    return path.removeprefix("/queue").removesuffix("/stream").strip("/")
