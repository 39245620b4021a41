"""What requests bring along by address, here before they are accepted: each file named by what is in it."""

import asyncio
import base64
import errno
import os
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic_core import to_json

from models.schema import ImageInput, Limits, input_urls
from server.errors import InvalidInput, InvalidInputFile, QueueFull
from server.executor import FairExecutor
from server.inputs import hub, images, loras
from server.inputs.cache import LORA, InputCache
from server.net.outbound import ForbiddenURL, OutboundClient
from server.storage.file_store import DISK_FULL_ERRNOS, FileStore, disk_error

MAX_IMAGE_BYTES = 25 * 2**20
#: What an input needs that brings the largest picture as a data URI; the rest of it is small.
MAX_INPUT_BYTES = MAX_IMAGE_BYTES * 4 // 3 + 2**20
#: How many are on their way at a time, and how many of them one owner's.
MAX_DOWNLOADS, MAX_DOWNLOADS_PER_OWNER = 32, 8
#: How many addresses are remembered with the ETags of what came from them.
MAX_KNOWN = 10_000
MAX_KNOWN_ADDRESS = 1024
_OWN_PATH = re.compile(r"/files/([0-9a-f]{32}\.[a-z0-9]{1,8})")
MAX_ADDRESS = 8192
#: Characters of base64 that are decoded at a time; four of them are three bytes.
_PART = 2**20
_SCHEME = re.compile(r"[a-z][a-z0-9+.\-]*://", re.IGNORECASE)
_DATA = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class InputType:
    """What is brought: how large at most, how long it may take, and what becomes of it.

    `keep` checks the first file, and puts what is kept of it into the place of the second; it returns its ending.
    """

    max_bytes: int
    max_seconds: float
    store: Callable[[Path, Path, Limits], str]
    #: What is asked of the first bytes, before the others come.
    accepts: Callable[[bytes], None] = lambda start: None


@dataclass(frozen=True)
class _CachedDownload:
    """What came from an address, and the ETag that it had."""

    etag: str
    name: str


class InputResolver:
    """Pictures, as RGB within the limits, and LoRA weights. A retry finds the very bytes that were accepted."""

    def __init__(
        self,
        cache: InputCache,
        outbound: OutboundClient,
        files: FileStore,
        limits: Limits,
        *,
        pending_bytes: Callable[[str, Collection[str]], int],
        max_lora_bytes: int = 2**30,
        max_bytes_per_owner: int = 5 * 10**9,
    ) -> None:
        """`pending_bytes` says what the waiting requests of an owner need on the disk, these files included."""
        self.cache = cache
        self.outbound = outbound
        self._files = files
        self._pending_bytes = pending_bytes
        self.limits = limits
        self._max_bytes_per_owner = max_bytes_per_owner
        self._kinds = {
            "picture": InputType(MAX_IMAGE_BYTES, 60.0, _store_image),
            "lora": InputType(max_lora_bytes, 300.0, _store_lora, loras.check_start),
        }
        self._known: OrderedDict[tuple[str, str], _CachedDownload] = OrderedDict()
        self._downloads = asyncio.Semaphore(MAX_DOWNLOADS)
        self._downloads_of = defaultdict[str, asyncio.Semaphore](partial(asyncio.Semaphore, MAX_DOWNLOADS_PER_OWNER))
        # Threads of their own, so that large files keep nobody's submit waiting.
        self._executor = FairExecutor("inputs", 4, 1)

    async def resolve(self, request: ImageInput, owner: str) -> dict[str, str]:
        """Everything that the request names by address: the field's place, and the file's name.

        Raises InvalidInput, naming the field, QueueFull for an owner whose requests need too much, and DiskFull.
        """
        # What a request names twice comes once.
        found: dict[tuple[str, str], str] = {}
        input_files: dict[str, str] = {}
        with self.cache.pin() as hold:
            for loc, kind, address in input_urls(request):
                if (kind, address) not in found:
                    found[kind, address] = await self._resolve_one(address, owner, kind, loc)
                    hold(found[kind, address])
                input_files[".".join(map(str, loc))] = found[kind, address]
        if self._pending_bytes(owner, set(found.values())) > self._max_bytes_per_owner:
            raise QueueFull("The waiting requests of this key bring too much along (--max-uploads-gb); try again later")
        return input_files

    async def _resolve_one(self, address: str, owner: str, kind: str, loc: Loc) -> str:
        """One of them, its errors in fal's words."""
        try:
            return await self._resolve(address, owner, kind)
        except InvalidInputFile as error:
            entry = {"type": error.type, "loc": ["body", *loc], "msg": str(error), "input": address[:1000]}
            raise InvalidInput([{**entry, "ctx": error.ctx} if error.ctx else entry]) from None
        except OSError as error:
            if error.errno in (*DISK_FULL_ERRNOS, errno.EROFS):
                raise disk_error(error) from error
            raise

    def sweep(self) -> int:
        """Delete what no request needs any more; returns how many."""
        return self.cache.sweep()

    async def _resolve(self, address: str, owner: str, kind_name: str) -> str:
        kind, temp_path = self._kinds[kind_name], self.cache.temp_path()
        try:
            is_data = address[:5].lower() == "data:"
            if not is_data and len(address) > MAX_ADDRESS:
                raise InvalidInputFile("file_download_error", f"The address is longer than {MAX_ADDRESS} characters")
            if is_data:
                await self._executor.run(owner, _decode, address, temp_path, kind)
            elif own := _own_name(address):
                await self._executor.run(owner, self._link, own, owner, temp_path)
            else:
                return await self._download(address, owner, temp_path, kind_name)
            return await self._executor.run(owner, self._keep, temp_path, kind)
        finally:
            temp_path.unlink(missing_ok=True)

    async def _download(self, address: str, owner: str, temp_path: Path, kind_name: str) -> str:
        """From another server; what is here already and has not changed there does not come again."""
        kind = self._kinds[kind_name]
        async with self._downloads_of[owner], self._downloads:
            try:
                if kind_name == "lora":
                    address = await hub.resolve_hub_id(address, self.outbound, temp_path)
                if not _SCHEME.match(address[:100]):
                    raise InvalidInputFile("file_download_error", _what_is_accepted(kind_name))
                # What came from it as a picture was not looked at as a LoRA.
                known = self._known.get((kind_name, address))
                is_here = known is not None and await self._executor.run(owner, self.cache.touch, known.name)
                etag = known.etag if known and is_here else ""
                found = await self.outbound.download(
                    address, temp_path, kind.max_bytes, kind.max_seconds, etag, kind.accepts
                )
            except ForbiddenURL as error:
                raise InvalidInputFile("file_download_error", f"The file could not be downloaded: {error}") from None
        if found is None and known:
            return known.name
        name = await self._executor.run(owner, self._keep, temp_path, kind)
        if found and len(address) <= MAX_KNOWN_ADDRESS:
            self._known[kind_name, address] = _CachedDownload(found, name)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return name

    def _link(self, name: str, owner: str, to: Path) -> None:
        """A file of our own store: linked, not read, because it may be deleted meanwhile."""
        found = self._files.find(name)
        try:
            if found is None or (found.is_private and found.owner != owner):
                raise FileNotFoundError
            os.link(self._files.path(found), to)
        except FileNotFoundError:
            raise InvalidInputFile("file_download_error", "There is no such file on this server") from None

    def _keep(self, temp_path: Path, kind: InputType) -> str:
        """Check a file, and put what is kept of it into the place that its own bytes name."""
        if temp_path.stat().st_size > kind.max_bytes:
            raise _too_large(kind)
        ready = temp_path.with_suffix(".ready")
        try:
            return self.cache.add(ready, kind.store(temp_path, ready, self.limits))
        finally:
            ready.unlink(missing_ok=True)


def dump_input(request: ImageInput, input_files: Mapping[str, str]) -> str:
    """The request as it is kept: the name of its file takes the place of a data URI, which may be large."""
    told = request.model_dump(mode="json")
    for loc, _, address in input_urls(request):
        if address[:5].lower() == "data:":
            holder: Any = told
            for step in loc[:-1]:
                holder = holder[step]
            holder[loc[-1]] = input_files[".".join(map(str, loc))]
    return str(to_json(told), "utf-8")


def _store_image(temp_path: Path, ready: Path, limits: Limits) -> str:
    """What the engine gets is written anew, as PNG."""
    images.decode_image(temp_path, limits).save(ready, "PNG", compress_level=1)
    return ".png"


def _store_lora(temp_path: Path, ready: Path, limits: Limits) -> str:
    loras.check(temp_path)
    temp_path.rename(ready)
    return LORA


def _own_name(address: str) -> str | None:
    """The name in our own store, whatever the host is called: 128 random bits are nobody else's."""
    try:
        path = urlsplit(address).path
    except ValueError:
        return None
    matched = _OWN_PATH.fullmatch(path)
    return matched[1] if matched else None


def _what_is_accepted(kind: str) -> str:
    """For those who tried a path, above all."""
    more = ", or a hub id such as owner/name" if kind == "lora" else ""
    return (
        "This should be an http or https address, a data URI, or the address of a file uploaded to this server"
        f"{more}; paths on the server's own disk are never read"
    )


def _too_large(kind: InputType) -> InvalidInputFile:
    message = f"The file is larger than {kind.max_bytes / 2**20:.0f} MiB"
    return InvalidInputFile("file_too_large", message, max_size=kind.max_bytes)


def _decode(address: str, temp_path: Path, kind: InputType) -> None:
    """Write the bytes of a data URI."""
    matched = _DATA.match(address)
    if not matched:
        raise InvalidInputFile("file_download_error", "A data URI should be data:TYPE;base64,...")
    if (len(address) - matched.end()) * 3 // 4 > kind.max_bytes:
        raise _too_large(kind)
    starts = range(matched.end(), len(address), _PART)
    if 0 <= address.find("=", matched.end()) < len(address) - 2:
        raise InvalidInputFile("file_download_error", "The data URI is not base64: something follows its end")
    try:
        # Part by part: decoding holds Python's lock.
        with temp_path.open("wb") as file:
            for start in starts:
                file.write(base64.b64decode(address[start : start + _PART], validate=True))
    except ValueError as error:
        raise InvalidInputFile("file_download_error", f"The data URI is not base64: {error}") from None
