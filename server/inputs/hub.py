"""Files on the hub by the id that people write down: where the one they mean lies."""

import asyncio
import re
from pathlib import Path

from pydantic import BaseModel, ValidationError

from server.errors import InvalidInputFile
from server.net.outbound import OutboundClient

_ID = re.compile(r"[\w.\-]{1,96}/[\w.\-]{1,96}")
MAX_ANSWER_BYTES = 4 * 2**20
SECONDS = 30.0


class _Sibling(BaseModel):
    rfilename: str


class _Repository(BaseModel):
    """What the hub says of a repository, as far as it is read here."""

    sha: str
    siblings: list[_Sibling]


async def resolve_hub_id(address: str, outbound: OutboundClient, temp_path: Path) -> str:
    """An address as it is; for `owner/name` that of its weights, of which there must be one file.

    The answer of the hub is written to `temp_path`. Raises InvalidInputFile, and ForbiddenURL.
    """
    if not _ID.fullmatch(address):
        return address
    from huggingface_hub import constants

    await outbound.download(f"{constants.ENDPOINT}/api/models/{address}", temp_path, MAX_ANSWER_BYTES, SECONDS)
    try:
        said = _Repository.model_validate_json(await asyncio.to_thread(temp_path.read_bytes))
    except ValidationError:
        raise InvalidInputFile("file_download_error", f"The hub says nothing of {address} that can be read") from None
    names = [each.rfilename for each in said.siblings if each.rfilename.endswith(".safetensors")]
    if len(names) != 1:
        found = f"has {len(names)} safetensors files" if names else "has no safetensors file"
        raise InvalidInputFile("file_download_error", f"{address} {found}; give the URL of the one that is meant")
    return f"{constants.ENDPOINT}/{address}/resolve/{said.sha}/{names[0]}"
