"""Pictures, without a key: the name is the secret."""

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse

from server.errors import NotFound
from server.routes import parts_of

router = APIRouter(prefix="/files", tags=["files"])


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
    return FileResponse(path, media_type=content_type, headers=headers)
