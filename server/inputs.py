"""What requests bring along by address, here before they are accepted: each file named by what is in it."""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from models.schema import ImageInput, Limits, remotes
from server import pictures
from server.errors import DiskFull, InvalidInput, Unusable
from server.fetch import ForbiddenURL, Guard
from server.files import FULL, Files

MAX_PICTURE_BYTES = 25 * 2**20
#: Seconds for one download, from the look-up of the name to the last byte.
MAX_SECONDS = 60.0
#: How many are on their way at a time, and how many of them one owner's.
MAX_DOWNLOADS, MAX_DOWNLOADS_PER_OWNER = 32, 8
#: What is not needed yet is left alone so long: its request is being accepted.
GRACE_SECONDS = 600.0
_OWN_PATH = re.compile(r"/files/([0-9a-f]{32}\.[a-z0-9]{1,8})")
_DATA = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


class Inputs:
    """Pictures, as RGB within the limits. A retry after a crash finds the very bytes that were accepted."""

    def __init__(
        self,
        folder: Path,
        guard: Guard,
        files: Files,
        limits: Limits,
        needed: Callable[[], set[str]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self.guard = guard
        self._files = files
        self.limits = limits
        self._needed = needed
        self._clock = clock
        self._downloads = asyncio.Semaphore(MAX_DOWNLOADS)
        self._downloads_of: dict[str, asyncio.Semaphore] = {}
        # Threads of their own, so that large pictures keep nobody's submit waiting.
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
        for loc, _, address in remotes(request):
            try:
                brought[".".join(map(str, loc))] = await self._bring(address, owner)
            except Unusable as error:
                entry = {"type": error.type, "loc": ["body", *loc], "msg": str(error), "input": address[:1000]}
                raise InvalidInput([{**entry, "ctx": error.ctx} if error.ctx else entry]) from None
            except OSError as error:
                if error.errno in FULL:
                    raise DiskFull from error
                raise
        return brought

    def sweep(self) -> int:
        """Delete what no request needs that is not done; returns how many."""
        needed, before = self._needed(), self._clock() - GRACE_SECONDS
        strays = [path for path in self._folder.iterdir() if path.name not in needed and path.stat().st_mtime < before]
        for path in strays:
            path.unlink(missing_ok=True)
        return len(strays)

    async def _bring(self, address: str, owner: str) -> str:
        aside = self._folder / f"{secrets.token_hex(8)}.part"
        try:
            await self._fetch(address, owner, aside)
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._keep, aside)
        finally:
            aside.unlink(missing_ok=True)

    async def _fetch(self, address: str, owner: str, to: Path) -> None:
        """The bytes that an address stands for, as they are."""
        if address[:5].lower() == "data:":
            await asyncio.to_thread(to.write_bytes, _decoded(address))
            return
        if own := self._own(address):
            found = await asyncio.to_thread(self._files.find, own)
            if found is None or (found.is_private and found.owner != owner):
                raise Unusable("file_download_error", "There is no such file on this server")
            # Linked, not read: it may be deleted meanwhile.
            with contextlib.suppress(FileNotFoundError):
                os.link(self._files.path(found), to)
                return
            raise Unusable("file_download_error", "There is no such file on this server")
        semaphore = self._downloads_of.setdefault(owner, asyncio.Semaphore(MAX_DOWNLOADS_PER_OWNER))
        async with semaphore, self._downloads:
            try:
                await self.guard.download(address, to, MAX_PICTURE_BYTES, MAX_SECONDS)
            except ForbiddenURL as error:
                raise Unusable("file_download_error", f"The file could not be downloaded: {error}") from None

    def _own(self, address: str) -> str | None:
        """The name in our own store, whatever the host is called: 128 random bits are nobody else's."""
        try:
            path = urlsplit(address).path
        except ValueError:
            return None
        matched = _OWN_PATH.fullmatch(path)
        return matched[1] if matched else None

    def _keep(self, aside: Path) -> str:
        """Read the picture, and write what the engine gets: PNG, in the place that its own bytes name."""
        if aside.stat().st_size > MAX_PICTURE_BYTES:
            raise Unusable("file_too_large", _too_large(), max_size=MAX_PICTURE_BYTES)
        content = pictures.encode(pictures.read(aside, self.limits), "png", None)
        path = self._folder / f"{hashlib.sha256(content).hexdigest()}.png"
        whole = aside.with_suffix(".whole")
        try:
            with whole.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            whole.rename(path)
        finally:
            whole.unlink(missing_ok=True)
        return path.name


def _too_large() -> str:
    return f"The file is larger than {MAX_PICTURE_BYTES // 2**20} MiB"


def _decoded(address: str) -> bytes:
    """The bytes of a data URI."""
    matched = _DATA.match(address)
    if not matched:
        raise Unusable("file_download_error", "A data URI should be data:TYPE;base64,...")
    if (len(address) - matched.end()) * 3 // 4 > MAX_PICTURE_BYTES:
        raise Unusable("file_too_large", _too_large(), max_size=MAX_PICTURE_BYTES)
    try:
        return base64.b64decode(address[matched.end() :], validate=True)
    except binascii.Error as error:
        raise Unusable("file_download_error", f"The data URI is not base64: {error}") from None
