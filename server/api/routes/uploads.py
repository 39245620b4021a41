"""Uploads, in every form that fal's SDKs have had: initiate and PUT, multipart of two kinds, token and POST."""

import asyncio
from datetime import UTC, datetime, timedelta

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from server.api import validation
from server.api.dependencies import authenticate, get_services
from server.api.headers import lifecycle
from server.api.responses import FalJSONResponse
from server.errors import BadRequest
from server.net.bytes_in_flight import SMALL
from server.storage.multipart import Upload

router = APIRouter(tags=["storage"])

#: What a token that uploads is good for, and how long, in seconds.
UPLOADS = "uploads"
TOKEN_SECONDS = 3600
#: Bytes of the list of an upload's parts, each with its ETag.
MAX_LIST = 2 * 2**20


class UploadRequest(BaseModel):
    """What a client says of a file before it sends it."""

    content_type: str = Field("application/octet-stream", max_length=255)
    file_name: str = Field("file", max_length=1024)


class UploadedPart(BaseModel):
    """One part that a client says it sent."""

    model_config = ConfigDict(populate_by_name=True)

    part_number: int = Field(alias="partNumber", ge=1)


class CompleteUpload(BaseModel):
    """The parts that make up the file, in any order; none listed stands for all that were sent."""

    parts: list[UploadedPart] = []


@router.post("/storage/auth/token")
async def token(request: Request) -> Response:
    """A token for uploads, as fal-client asks for one before it sends a file."""
    expires_at = datetime.now(UTC) + timedelta(seconds=TOKEN_SECONDS)
    issued = get_services(request).keys.issue(authenticate(request), UPLOADS, TOKEN_SECONDS)
    # Python before 3.11 reads no "Z", so the offset is written out.
    stamp = expires_at.isoformat(timespec="seconds")
    return FalJSONResponse(
        {"token": issued, "token_type": "Bearer", "base_url": request.state.base_url, "expires_at": stamp}
    )


@router.post("/storage/upload/initiate")
@router.post("/storage/upload/initiate-multipart")
async def initiate(request: Request) -> Response:
    """Say where to PUT a file, and where it will be."""
    owner = authenticate(request)
    async with get_services(request).in_flight.body(request, owner, SMALL) as body:
        announced = validation.parse_body(UploadRequest, body or b"{}")
    upload = await _begin(request, owner, announced)
    base = request.state.base_url
    upload_url = f"{base}/storage/upload/{upload.upload_id}"
    return FalJSONResponse({"upload_url": upload_url, "file_url": f"{base}/files/{upload.name}"})


@router.put("/storage/upload/{upload_id}")
async def put(request: Request, upload_id: str) -> Response:
    """The whole file at once; the address is the secret, so no key is asked for."""
    uploads = get_services(request).uploads
    upload = uploads.find(upload_id)
    etag = await uploads.write_part(upload, 1, request.stream())
    await uploads.complete_single(upload)
    return FalJSONResponse({}, headers={"etag": etag})


@router.put("/storage/upload/{upload_id}/{part_number}")
@router.put("/files/{name}/multipart/{upload_id}/{part_number}")
async def put_part(request: Request, upload_id: str, part_number: int) -> Response:
    """One part: its ETag in the header, where Python looks, and in the body, where JavaScript does."""
    uploads = get_services(request).uploads
    upload = uploads.find(upload_id)
    etag = await uploads.write_part(upload, part_number, request.stream())
    return FalJSONResponse({"partNumber": part_number, "etag": etag}, headers={"etag": etag})


@router.post("/storage/upload/{upload_id}/complete")
@router.post("/files/{name}/multipart/{upload_id}/complete")
async def complete(request: Request, upload_id: str) -> Response:
    """Join the parts."""
    uploads = get_services(request).uploads
    upload = uploads.find(upload_id)
    async with get_services(request).in_flight.body(request, upload.owner, MAX_LIST) as body:
        completion = await uploads.executor.run(upload.owner, validation.parse_body, CompleteUpload, body or b"{}")
    listed = [part.part_number for part in completion.parts]
    file = await uploads.complete_single(upload, listed)
    url = f"{request.state.base_url}/files/{file.name}"
    return FalJSONResponse({"access_url": url, "file_url": url})


@router.post("/files/upload")
async def upload_at_once(request: Request) -> Response:
    """The file in one request, as fal-client sends small ones."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise BadRequest("The body should be the file itself, not a form: curl --data-binary @FILE, not -F")
    uploads = get_services(request).uploads
    upload = await _begin(request, authenticate(request, UPLOADS), _announced(request))
    try:
        await uploads.write_part(upload, 1, request.stream())
        file = await uploads.complete_single(upload)
    except BaseException:
        # Nobody was told of it, so nobody can go on with it. Not awaited: the client may be gone.
        asyncio.get_running_loop().run_in_executor(None, uploads.abort, upload)
        raise
    return FalJSONResponse({"access_url": f"{request.state.base_url}/files/{file.name}"})


@router.post("/files/upload/multipart")
async def begin_multipart(request: Request) -> Response:
    """Expect a file in parts, as fal-client sends large ones."""
    upload = await _begin(request, authenticate(request, UPLOADS), _announced(request))
    url = f"{request.state.base_url}/files/{upload.name}"
    return FalJSONResponse({"access_url": url, "uploadId": upload.upload_id})


def _announced(request: Request) -> UploadRequest:
    content_type = request.headers.get("content-type") or "application/octet-stream"
    file_name = request.headers.get("x-fal-file-name") or "file"
    return UploadRequest(content_type=content_type[:255], file_name=file_name[:1024])


async def _begin(request: Request, owner: str, announced: UploadRequest) -> Upload:
    get_services(request).rate_limiter.acquire(owner, "uploads")
    uploads = get_services(request).uploads
    return await uploads.executor.run(
        owner,
        uploads.create,
        owner,
        announced.content_type,
        announced.file_name,
        lifecycle(request.headers),
    )
