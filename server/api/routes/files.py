"""Generated images and uploads. The name of a file is a secret, so only private files require a key."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from server.api import responses
from server.api.dependencies import authenticate, get_services
from server.api.operations import content
from server.errors import NotFound, Unauthorized, UnsatisfiableRange

router = APIRouter(prefix="/files", tags=["files"])


class _File(FileResponse):
    """A FileResponse that refuses an invalid Range with fal's JSON instead of Starlette's plain text."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file, or an error if its Range is invalid."""
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


#: Types that a browser may show. Other files are sent as downloads, because HTML or SVG could contain a script.
_SHOWN = frozenset({"image/png", "image/jpeg", "image/webp"})
#: An upload has the type that its client named, so any type is possible. Generators need one that they know first.
_CONTENT = content("application/octet-stream", *sorted(_SHOWN), "*/*", is_binary=True)


@router.head("/{name}", include_in_schema=False)
@router.get(
    "/{name}",
    summary="Get a file",
    response_class=FileResponse,
    response_description="The file.",
    responses={
        200: _CONTENT,
        206: {"description": "The part that the Range header selects.", **_CONTENT},
    },
    openapi_extra={"security": [{"apiKeyAuth": []}, {}]},
)
async def file(
    request: Request, name: Annotated[str, Path(description="The name in the URL of the file.")]
) -> FileResponse:
    """Return an image or upload, or the part that a Range header selects. Private files require their owner's key."""
    files = get_services(request).files
    stored = await asyncio.to_thread(files.find, name)
    if stored is None or (stored.is_private and not _is_owner(request, stored.owner)):
        raise NotFound("File not found")
    path = files.path(stored)
    if not path.is_file():
        raise NotFound("File not found")
    is_inline = stored.content_type.partition(";")[0].strip().lower() in _SHOWN
    headers = {
        # Any web page that knows the name of an image may show it.
        "access-control-allow-origin": "*",
        "cross-origin-resource-policy": "cross-origin",
        "x-content-type-options": "nosniff",
        "content-security-policy": "sandbox; default-src 'none'",
        "cache-control": "private, max-age=86400, immutable",
    }
    return _File(
        path,
        media_type=stored.content_type,
        headers=headers,
        filename=None if is_inline else stored.file_name or name,
        content_disposition_type="inline" if is_inline else "attachment",
    )


def _is_owner(request: Request, owner: str) -> bool:
    try:
        return authenticate(request) == owner
    except Unauthorized:
        return False
