"""Pictures, without a key: the name is the secret."""

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from server import wire
from server.errors import NotFound, UnsatisfiableRange
from server.routes import parts_of

router = APIRouter(prefix="/files", tags=["files"])


class _File(FileResponse):
    """Starlette's own, whose refusals of a Range are plain text, with fal's JSON instead."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file, or say that this Range of it cannot be sent."""
        refusal: list[tuple[bytes, bytes]] | None = None

        async def sender(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refusal = message["headers"]
            if refusal is None:
                await send(message)

        await super().__call__(scope, receive, sender)
        if refusal is not None:
            response = wire.error(UnsatisfiableRange())
            response.raw_headers += [header for header in refusal if header[0] == b"content-range"]
            await response(scope, receive, send)


@router.api_route("/{name}", methods=["GET", "HEAD"], response_class=FileResponse)
async def file(request: Request, name: str) -> FileResponse:
    """One picture; understands Range."""
    found = await asyncio.to_thread(parts_of(request).files.open, name)
    if found is None or not found[0].is_file():
        raise NotFound("File not found")
    path, content_type = found
    headers = {
        # Any page may show a picture whose name it was told.
        "access-control-allow-origin": "*",
        "cross-origin-resource-policy": "cross-origin",
        "x-content-type-options": "nosniff",
        "cache-control": "private, max-age=86400, immutable",
    }
    return _File(path, media_type=content_type, headers=headers)
