"""Pictures, without a key: the name is the secret."""

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from server.api import responses
from server.api.dependencies import authenticate, get_services
from server.errors import NotFound, Unauthorized, UnsatisfiableRange

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
            response = responses.error_response(UnsatisfiableRange())
            response.raw_headers += [header for header in refusal if header[0] == b"content-range"]
            await response(scope, receive, send)


#: What a browser may show as it is; an uploaded page or drawing could carry a script.
_SHOWN = frozenset({"image/png", "image/jpeg", "image/webp"})


@router.head("/{name}", include_in_schema=False)
@router.get("/{name}", response_class=FileResponse)
async def file(request: Request, name: str) -> FileResponse:
    """One picture or upload; understands Range. A private one needs its owner's key."""
    files = get_services(request).files
    found = await asyncio.to_thread(files.find, name)
    if found is None or (found.is_private and not _is_owner(request, found.owner)):
        raise NotFound("File not found")
    path = files.path(found)
    if not path.is_file():
        raise NotFound("File not found")
    is_shown = found.content_type.partition(";")[0].strip().lower() in _SHOWN
    headers = {
        # Any page may show a picture whose name it was told.
        "access-control-allow-origin": "*",
        "cross-origin-resource-policy": "cross-origin",
        "x-content-type-options": "nosniff",
        "content-security-policy": "sandbox; default-src 'none'",
        "cache-control": "private, max-age=86400, immutable",
    }
    return _File(
        path,
        media_type=found.content_type,
        headers=headers,
        filename=None if is_shown else found.file_name or name,
        content_disposition_type="inline" if is_shown else "attachment",
    )


def _is_owner(request: Request, owner: str) -> bool:
    try:
        return authenticate(request) == owner
    except Unauthorized:
        return False
