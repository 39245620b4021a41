"""Types of the responses to uploads."""

from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict


class UploadToken(TypedDict):
    """A token for uploads."""

    token: str
    token_type: Annotated[str, Field(description="The scheme of the Authorization header, always Bearer.")]
    base_url: Annotated[str, Field(description="The URL in front of /files/upload.")]
    expires_at: Annotated[str, Field(description="When the token expires, as an ISO 8601 time.")]


class UploadURLs(TypedDict):
    """The two URLs of an upload that has begun."""

    upload_url: Annotated[str, Field(description="The URL to PUT the file to.")]
    file_url: Annotated[str, Field(description="The URL of the file after the upload.")]


class PartReceipt(TypedDict):
    """The receipt for one part."""

    partNumber: int
    etag: Annotated[str, Field(description="The MD5 hash of the part, in quotation marks.")]


class FileURL(TypedDict):
    """The URL of an uploaded file."""

    access_url: str


class CompletedUpload(TypedDict):
    """The URL of an uploaded file, under the names that fal's SDKs read."""

    access_url: str
    file_url: str


class MultipartUpload(TypedDict):
    """A multipart upload that has begun."""

    access_url: Annotated[str, Field(description="The URL of the file after the upload.")]
    uploadId: str
