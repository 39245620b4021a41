"""Uploads in all forms that fal's SDKs have used: initiate and PUT, two kinds of multipart, token and POST."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from server.api import validation
from server.api.dependencies import authenticate, get_services
from server.api.headers import lifecycle
from server.api.operations import PUBLIC, file_body, json_body, parameter
from server.api.parameters import references
from server.api.responses import FalJSONResponse
from server.api.schemas.uploads import (
    CompletedUpload,
    FileURL,
    MultipartUpload,
    PartReceipt,
    UploadToken,
    UploadURLs,
)
from server.errors import BadRequest
from server.net.bytes_in_flight import SMALL
from server.storage.multipart import Upload

router = APIRouter(tags=["storage"])

#: Scope of an upload token, and seconds until it expires.
UPLOADS = "uploads"
TOKEN_SECONDS = 3600
#: Maximum bytes of a body that lists an upload's parts, each with its ETag.
MAX_LIST = 2 * 2**20


UploadID = Annotated[str, Path(description="The id in the URL that the beginning of the upload returned.")]
PartNumber = Annotated[int, Path(description="The number of the part, from 1 to 10,000.", examples=[1])]
FileName = Annotated[str, Path(description="The name in the URL of the file.")]
#: The parameters of every request that begins an upload.
_BEGINNING = {"parameters": references("lifecycle")}
#: The same with the name of the file.
_NAMED = {
    "parameters": [
        parameter(
            "header",
            "X-Fal-File-Name",
            {"type": "string", "description": "The name of the file. The URL of the file keeps its extension."},
        ),
        *references("lifecycle"),
    ]
}


class UploadRequest(BaseModel):
    """A client's description of a file before the upload."""

    content_type: str = Field(
        "application/octet-stream", max_length=255, description="The type of the file.", examples=["image/png"]
    )
    file_name: str = Field(
        "file",
        max_length=1024,
        description="The name of the file. The URL of the file keeps its extension.",
        examples=["photo.png"],
    )


class UploadedPart(BaseModel):
    """A part that the client has sent."""

    model_config = ConfigDict(populate_by_name=True)

    part_number: int = Field(alias="partNumber", ge=1)


class CompleteUpload(BaseModel):
    """The parts of the file, in any order; an empty list means all parts that were sent."""

    parts: list[UploadedPart] = []


@router.post("/storage/auth/token", summary="Issue a token for uploads", response_model=UploadToken)
async def token(request: Request) -> Response:
    """Issue a token for uploads, which fal-client requests before it sends a file."""
    expires_at = datetime.now(UTC) + timedelta(seconds=TOKEN_SECONDS)
    issued = get_services(request).keys.issue(authenticate(request), UPLOADS, TOKEN_SECONDS)
    # The offset is written as +00:00, because Python before 3.11 cannot parse "Z".
    stamp = expires_at.isoformat(timespec="seconds")
    return FalJSONResponse(
        UploadToken(token=issued, token_type="Bearer", base_url=request.state.base_url, expires_at=stamp)  # noqa: S106
    )


@router.post(
    "/storage/upload/initiate",
    summary="Begin an upload",
    response_model=UploadURLs,
    openapi_extra={**_BEGINNING, **json_body(UploadRequest, is_required=False)},
)
@router.post(
    "/storage/upload/initiate-multipart",
    name="initiate_multipart",
    summary="Begin an upload in parts",
    response_model=UploadURLs,
    openapi_extra={**_BEGINNING, **json_body(UploadRequest, is_required=False)},
)
async def initiate(request: Request) -> Response:
    """Begin an upload, and return two URLs: one to PUT the file to, and the final URL of the file."""
    owner = authenticate(request)
    async with get_services(request).in_flight.body(request, owner, SMALL) as body:
        upload_request = validation.parse_body(UploadRequest, body or b"{}")
    upload = await _begin(request, owner, upload_request)
    base = request.state.base_url
    upload_url = f"{base}/storage/upload/{upload.upload_id}"
    return FalJSONResponse(UploadURLs(upload_url=upload_url, file_url=f"{base}/files/{upload.name}"))


@router.put(
    "/storage/upload/{upload_id}",
    summary="Send the whole file",
    response_model=dict[str, str],
    response_description="An empty object.",
    openapi_extra={**PUBLIC, **file_body()},
)
async def put(request: Request, upload_id: UploadID) -> Response:
    """Receive the whole file at once. No key is required, because the URL is a secret."""
    uploads = get_services(request).uploads
    upload = uploads.find(upload_id)
    etag = await uploads.write_part(upload, 1, request.stream())
    await uploads.complete(upload)
    return FalJSONResponse({}, headers={"etag": etag})


@router.put(
    "/storage/upload/{upload_id}/{part_number}",
    summary="Send one part of a file",
    response_model=PartReceipt,
    openapi_extra={**PUBLIC, **file_body()},
)
async def put_part(request: Request, upload_id: UploadID, part_number: PartNumber) -> Response:
    """Receive one part. No key is required, because the URL is a secret.

    fal's Python client reads the ETag from the header, the JavaScript client from the body.
    """
    uploads = get_services(request).uploads
    upload = uploads.find(upload_id)
    etag = await uploads.write_part(upload, part_number, request.stream())
    return FalJSONResponse(PartReceipt(partNumber=part_number, etag=etag), headers={"etag": etag})


@router.put(
    "/files/{name}/multipart/{upload_id}/{part_number}",
    summary="Send one part of a multipart upload",
    response_model=PartReceipt,
    openapi_extra={**PUBLIC, **file_body()},
)
async def put_file_part(request: Request, name: FileName, upload_id: UploadID, part_number: PartNumber) -> Response:
    """Receive one part, as `put_part` does. The name is not used, because the id is enough."""
    return await put_part(request, upload_id, part_number)


@router.post(
    "/storage/upload/{upload_id}/complete",
    summary="End an upload in parts",
    response_model=CompletedUpload,
    openapi_extra={**PUBLIC, **json_body(CompleteUpload, is_required=False)},
)
async def complete(request: Request, upload_id: UploadID) -> Response:
    """Join the parts into the file, and return the file's URL."""
    uploads = get_services(request).uploads
    upload = uploads.find(upload_id)
    async with get_services(request).in_flight.body(request, upload.owner, MAX_LIST) as body:
        completion = await uploads.executor.run(upload.owner, validation.parse_body, CompleteUpload, body or b"{}")
    part_numbers = [part.part_number for part in completion.parts]
    file = await uploads.complete(upload, part_numbers)
    url = f"{request.state.base_url}/files/{file.name}"
    return FalJSONResponse(CompletedUpload(access_url=url, file_url=url))


@router.post(
    "/files/{name}/multipart/{upload_id}/complete",
    summary="End a multipart upload",
    response_model=CompletedUpload,
    openapi_extra={**PUBLIC, **json_body(CompleteUpload, is_required=False)},
)
async def complete_file(request: Request, name: FileName, upload_id: UploadID) -> Response:
    """Join the parts into the file, as `complete` does. The name is not used, because the id is enough."""
    return await complete(request, upload_id)


@router.post(
    "/files/upload",
    summary="Upload a file in one request",
    response_model=FileURL,
    openapi_extra={**_NAMED, **file_body()},
)
async def upload_at_once(request: Request) -> Response:
    """Receive a whole file in one request, as fal-client sends small files."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise BadRequest("The body should be the file itself, not a form; use curl --data-binary @FILE instead of -F")
    uploads = get_services(request).uploads
    upload = await _begin(request, authenticate(request, UPLOADS), _upload_request(request))
    try:
        await uploads.write_part(upload, 1, request.stream())
        file = await uploads.complete(upload)
    except BaseException:
        # The client never learns the upload's id, so it cannot continue the upload. Do not await `abort`, because this
        # task may be cancelled after a disconnect.
        asyncio.get_running_loop().run_in_executor(None, uploads.abort, upload)
        raise
    return FalJSONResponse(FileURL(access_url=f"{request.state.base_url}/files/{file.name}"))


@router.post(
    "/files/upload/multipart",
    summary="Begin a multipart upload",
    response_model=MultipartUpload,
    openapi_extra=_NAMED,
)
async def begin_multipart(request: Request) -> Response:
    """Begin a multipart upload, as fal-client does for large files."""
    upload = await _begin(request, authenticate(request, UPLOADS), _upload_request(request))
    url = f"{request.state.base_url}/files/{upload.name}"
    return FalJSONResponse(MultipartUpload(access_url=url, uploadId=upload.upload_id))


def _upload_request(request: Request) -> UploadRequest:
    content_type = request.headers.get("content-type") or "application/octet-stream"
    file_name = request.headers.get("x-fal-file-name") or "file"
    return UploadRequest(content_type=content_type[:255], file_name=file_name[:1024])


async def _begin(request: Request, owner: str, upload_request: UploadRequest) -> Upload:
    get_services(request).rate_limiter.acquire(owner, "uploads")
    uploads = get_services(request).uploads
    return await uploads.executor.run(
        owner,
        uploads.create,
        owner,
        upload_request.content_type,
        upload_request.file_name,
        lifecycle(request.headers),
    )
