"""Ids of Hugging Face repositories (`owner/name`), resolved to the URL of the weights file."""

import asyncio
import re
from pathlib import Path

from pydantic import BaseModel, ValidationError

from server.errors import InvalidInputFile
from server.net.outbound import OutboundClient

_ID = re.compile(r"[\w.\-]{1,96}/[\w.\-]{1,96}")
#: The largest description of a repository that the hub may send, in bytes, and the most seconds that this may take.
MAX_ANSWER_BYTES = 4 * 2**20
SECONDS = 30.0


class _Sibling(BaseModel):
    rfilename: str


class _Repository(BaseModel):
    """The hub's description of a repository, reduced to the fields that are used here."""

    sha: str
    siblings: list[_Sibling]


async def resolve_hub_id(reference: str, outbound: OutboundClient, temp_path: Path) -> str:
    """Return the URL of the single safetensors file in the repository `owner/name`; return any other text unchanged.

    The hub's response is written to `temp_path`. Raises InvalidInputFile if the response cannot be read, or lists no
    safetensors file or several; and the errors of `OutboundClient.download`.
    """
    if not _ID.fullmatch(reference):
        return reference
    from huggingface_hub import constants

    await outbound.download(f"{constants.ENDPOINT}/api/models/{reference}", temp_path, MAX_ANSWER_BYTES, SECONDS)
    try:
        repository = _Repository.model_validate_json(await asyncio.to_thread(temp_path.read_bytes))
    except ValidationError:
        message = f"Hugging Face's description of {reference} cannot be read; give the URL of a file instead"
        raise InvalidInputFile("file_download_error", message) from None
    names = [sibling.rfilename for sibling in repository.siblings if sibling.rfilename.endswith(".safetensors")]
    if len(names) != 1:
        problem = f"has {len(names)} safetensors files" if names else "has no safetensors file"
        raise InvalidInputFile("file_download_error", f"{reference} {problem}; give the URL of the file to use")
    return f"{constants.ENDPOINT}/{reference}/resolve/{repository.sha}/{names[0]}"
