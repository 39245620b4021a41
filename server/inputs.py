"""What requests bring along by address, here before they are accepted: each file named by what is in it."""

import asyncio
import base64
import binascii
import hashlib
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from models.schema import ImageInput, Limits, remotes
from server import hub_files, lora_files, pictures
from server.errors import DiskFull, InvalidInput, Unusable
from server.fetch import ForbiddenURL, Guard
from server.files import FULL, Files

MAX_PICTURE_BYTES = 25 * 2**20
#: How many are on their way at a time, and how many of them one owner's.
MAX_DOWNLOADS, MAX_DOWNLOADS_PER_OWNER = 32, 8
#: What is not needed yet is left alone so long: its request is being accepted.
GRACE_SECONDS = 600.0
#: How many addresses are remembered with the ETags of what came from them.
MAX_KNOWN = 10_000
_OWN_PATH = re.compile(r"/files/([0-9a-f]{32}\.[a-z0-9]{1,8})")
_DATA = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


Result = TypeVar("Result")


@dataclass(frozen=True)
class Kind:
    """What is brought: how large at most, how long it may take, and what becomes of it.

    `keep` checks the first file, and puts what is kept of it into the place of the second; it returns its ending.
    """

    max_bytes: int
    max_seconds: float
    keep: Callable[[Path, Path, Limits], str]


@dataclass(frozen=True)
class _Known:
    """What came from an address, and the ETag that it had."""

    etag: str
    name: str


class Inputs:
    """Pictures, as RGB within the limits, and LoRA weights. A retry finds the very bytes that were accepted."""

    def __init__(
        self,
        folder: Path,
        guard: Guard,
        files: Files,
        limits: Limits,
        needed: Callable[[], set[str]],
        *,
        max_lora_bytes: int = 2**30,
        max_kept_bytes: int = 10 * 10**9,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self.guard = guard
        self._files = files
        self.limits = limits
        self._needed = needed
        self.max_kept_bytes = max_kept_bytes
        self._clock = clock
        self._kinds = {
            "picture": Kind(MAX_PICTURE_BYTES, 60.0, _keep_picture),
            "lora": Kind(max_lora_bytes, 300.0, _keep_lora),
        }
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._downloads = asyncio.Semaphore(MAX_DOWNLOADS)
        self._downloads_of: dict[str, asyncio.Semaphore] = {}
        # Threads of their own, so that large files keep nobody's submit waiting.
        self._threads = ThreadPoolExecutor(2, "inputs")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return self._folder / name

    async def bring(self, request: ImageInput, owner: str) -> dict[str, str]:
        """Everything that the request names by address: the field's place, and the file's name.

        Raises InvalidInput, naming the field, and DiskFull.
        """
        brought: dict[str, str] = {}
        for loc, kind, address in remotes(request):
            try:
                brought[".".join(map(str, loc))] = await self._bring(address, owner, self._kinds[kind])
            except Unusable as error:
                entry = {"type": error.type, "loc": ["body", *loc], "msg": str(error), "input": address[:1000]}
                raise InvalidInput([{**entry, "ctx": error.ctx} if error.ctx else entry]) from None
            except OSError as error:
                if error.errno in FULL:
                    raise DiskFull from error
                raise
        return brought

    def sweep(self) -> int:
        """Delete what no request needs that is not done: pictures at once, LoRAs as the room is needed, oldest first.

        Returns how many.
        """
        needed, before = self._needed(), self._clock() - GRACE_SECONDS
        idle = [(path, path.stat()) for path in self._folder.iterdir() if path.name not in needed]
        idle = sorted((each for each in idle if each[1].st_mtime < before), key=lambda each: each[1].st_mtime)
        excess = sum(path.stat().st_size for path in self._folder.glob("*.safetensors")) - self.max_kept_bytes
        num_deleted = 0
        for path, stat in idle:
            if path.suffix == ".safetensors":
                if excess <= 0:
                    continue
                excess -= stat.st_size
            path.unlink(missing_ok=True)
            num_deleted += 1
        return num_deleted

    async def _bring(self, address: str, owner: str, kind: Kind) -> str:
        aside = self._folder / f"{secrets.token_hex(8)}.part"
        try:
            if address[:5].lower() == "data:":
                await asyncio.to_thread(aside.write_bytes, _decoded(address, kind))
            elif own := _own_name(address):
                await asyncio.to_thread(self._link, own, owner, aside)
            else:
                return await self._downloaded(address, owner, aside, kind)
            return await self._in_thread(self._keep, aside, kind)
        finally:
            aside.unlink(missing_ok=True)

    async def _downloaded(self, address: str, owner: str, aside: Path, kind: Kind) -> str:
        """From another server; what is here already and has not changed there does not come again."""
        semaphore = self._downloads_of.setdefault(owner, asyncio.Semaphore(MAX_DOWNLOADS_PER_OWNER))
        async with semaphore, self._downloads:
            try:
                if kind is self._kinds["lora"]:
                    address = await hub_files.address_of(address, self.guard, aside)
                known = self._known.get(address)
                is_here = known is not None and await self._in_thread(_touch, self.path(known.name))
                etag = known.etag if known and is_here else ""
                found = await self.guard.download(address, aside, kind.max_bytes, kind.max_seconds, etag)
            except ForbiddenURL as error:
                raise Unusable("file_download_error", f"The file could not be downloaded: {error}") from None
        if found is None and known:
            return known.name
        name = await self._in_thread(self._keep, aside, kind)
        if found:
            self._known[address] = _Known(found, name)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return name

    async def _in_thread(self, act: Callable[..., Result], *given: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, act, *given)

    def _link(self, name: str, owner: str, to: Path) -> None:
        """A file of our own store: linked, not read, because it may be deleted meanwhile."""
        found = self._files.find(name)
        try:
            if found is None or (found.is_private and found.owner != owner):
                raise FileNotFoundError
            os.link(self._files.path(found), to)
        except FileNotFoundError:
            raise Unusable("file_download_error", "There is no such file on this server") from None

    def _keep(self, aside: Path, kind: Kind) -> str:
        """Put a file into the place that its own bytes name."""
        if aside.stat().st_size > kind.max_bytes:
            raise _too_large(kind)
        ready = aside.with_suffix(".ready")
        try:
            ending = kind.keep(aside, ready, self.limits)
            with ready.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            path = self._folder / f"{digest}.{ending}"
            ready.rename(path)
        finally:
            ready.unlink(missing_ok=True)
        return path.name


def _keep_picture(aside: Path, ready: Path, limits: Limits) -> str:
    """What the engine gets is written anew, as PNG."""
    ready.write_bytes(pictures.encode(pictures.read(aside, limits), "png", None))
    return "png"


def _keep_lora(aside: Path, ready: Path, limits: Limits) -> str:
    lora_files.check(aside)
    aside.rename(ready)
    # An upload that is linked here may be old, and the sweep goes by that.
    os.utime(ready)
    return "safetensors"


def _touch(path: Path) -> bool:
    """Whether a file is here; it counts as used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _own_name(address: str) -> str | None:
    """The name in our own store, whatever the host is called: 128 random bits are nobody else's."""
    try:
        path = urlsplit(address).path
    except ValueError:
        return None
    matched = _OWN_PATH.fullmatch(path)
    return matched[1] if matched else None


def _too_large(kind: Kind) -> Unusable:
    words = f"The file is larger than {kind.max_bytes / 2**20:.0f} MiB"
    return Unusable("file_too_large", words, max_size=kind.max_bytes)


def _decoded(address: str, kind: Kind) -> bytes:
    """The bytes of a data URI."""
    matched = _DATA.match(address)
    if not matched:
        raise Unusable("file_download_error", "A data URI should be data:TYPE;base64,...")
    if (len(address) - matched.end()) * 3 // 4 > kind.max_bytes:
        raise _too_large(kind)
    try:
        return base64.b64decode(address[matched.end() :], validate=True)
    except binascii.Error as error:
        raise Unusable("file_download_error", f"The data URI is not base64: {error}") from None
