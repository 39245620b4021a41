"""The images and weights that a request refers to, fetched and checked before the request is accepted."""

import asyncio
import os
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from models.image_size import Limits
from models.schema import ImageInput, input_urls
from server.errors import InternalError, InvalidInput, InvalidInputFile, QueueFull
from server.executor import FairExecutor
from server.inputs import hub, images, urls, weights
from server.inputs.cache import WEIGHTS, InputCache
from server.inputs.spool import Spool, too_large
from server.net.outbound import ForbiddenURL, OutboundClient
from server.storage.file_store import FileStore, disk_errors

MAX_IMAGE_BYTES = 25 * 2**20
#: The most bytes of a realtime input: enough for the largest image as a data URI, and for the other fields.
MAX_INPUT_BYTES = MAX_IMAGE_BYTES * 4 // 3 + 2**20
#: How many downloads run at a time, in total and per owner.
MAX_DOWNLOADS, MAX_DOWNLOADS_PER_OWNER = 32, 8
#: How many URLs are remembered with the ETags of their files, and the longest of these URLs, in characters.
MAX_KNOWN = 10_000
MAX_CACHED_URL = 1024
#: The longest URL of a file, in characters; data URIs may be longer.
MAX_URL = 8192


Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class InputType:
    """A type of input file: the largest size in bytes, the most seconds of a download, and how to check and store it.

    `store` checks the file at the first path, writes the version to keep to the second path, and returns the extension
    of that version.
    """

    max_bytes: int
    max_seconds: float
    store: Callable[[Path, Path, Limits], str]
    #: Checks the first bytes of a download, so that a bad file is refused before the rest arrives.
    accepts: Callable[[bytes], None] = lambda start: None


@dataclass(frozen=True)
class _CachedDownload:
    """The ETag of a downloaded file, and the file's name in the cache."""

    etag: str
    name: str


class InputResolver:
    """A resolver that stores the images and weights of requests in the cache.

    Images are stored as RGB, scaled down to the limits. A job reads only the stored files, so a retry reads the same
    bytes.
    """

    def __init__(
        self,
        cache: InputCache,
        outbound: OutboundClient,
        files: FileStore,
        limits: Limits,
        *,
        pending_bytes: Callable[[str, Collection[str]], int],
        max_lora_bytes: int = 2**30,
        max_control_net_bytes: int = 2**32,
        max_bytes_per_owner: int = 5 * 10**9,
    ) -> None:
        """Start empty.

        `pending_bytes` takes an owner and names of files. It returns the bytes that these files and the unfinished
        requests of the owner need together.
        """
        self.cache = cache
        self.outbound = outbound
        self._files = files
        self._pending_bytes = pending_bytes
        self.limits = limits
        self._max_bytes_per_owner = max_bytes_per_owner
        self._kinds = {"image": InputType(MAX_IMAGE_BYTES, 60.0, _store_image)}
        max_bytes_of = {"lora": max_lora_bytes, **dict.fromkeys(("control_net", "ip_adapter"), max_control_net_bytes)}
        for kind, max_bytes in max_bytes_of.items():
            self._kinds[kind] = InputType(max_bytes, 600.0, partial(_store_weights, kind), weights.check_start)
        self._known: OrderedDict[tuple[str, str], _CachedDownload] = OrderedDict()
        self._downloads = asyncio.Semaphore(MAX_DOWNLOADS)
        self._downloads_of = defaultdict[str, asyncio.Semaphore](partial(asyncio.Semaphore, MAX_DOWNLOADS_PER_OWNER))
        # Separate threads, so that large files do not delay requests without files.
        self._executor = FairExecutor("inputs", 4, 1)

    async def resolve(self, request: ImageInput, owner: str, body: Spool | None = None) -> dict[str, str]:
        """Fetch every file that the request refers to; return the file names by field path, such as "loras.0.path".

        `body` holds the long data of the request's data URIs. Raises InvalidInput, which names the field; QueueFull if
        the owner's unfinished requests would need too much disk space; InternalError if a file could not be checked;
        and DiskFull.
        """
        self._check_space(owner, ())
        # A file that the request refers to twice is fetched once.
        names: dict[tuple[str, str], str] = {}
        input_files: dict[str, str] = {}
        with self.cache.pin() as hold:
            for loc, kind, url in input_urls(request):
                if (kind, url) not in names:
                    names[kind, url] = await self._resolve_one(url, owner, kind, loc, body)
                    hold(names[kind, url])
                    # Check after each file, because a request can refer to many large ones.
                    self._check_space(owner, set(names.values()), loc, url)
                input_files[".".join(map(str, loc))] = names[kind, url]
        return input_files

    def _check_space(self, owner: str, names: Collection[str], loc: Loc = (), url: str = "") -> None:
        """Check that the owner's unfinished requests may need these files of a request too.

        Raises QueueFull, and InvalidInput if the files are too large even without other requests: `loc` and `url` are
        the last file's.
        """
        max_bytes = self._max_bytes_per_owner
        if sum(self.cache.size(name) for name in names) > max_bytes:
            message = (
                f"The files of this request have more than {max_bytes / 1e9:g} GB together, which --max-uploads-gb does"
                " not allow; use fewer or smaller files"
            )
            raise InvalidInput.of("file_too_large", ("body", *loc), message, url[:1000], max_size=max_bytes)
        if self._pending_bytes(owner, names) > max_bytes:
            raise QueueFull(
                "The input files of this key's unfinished requests need more disk space than --max-uploads-gb allows;"
                " try again when some requests have finished"
            )

    async def _resolve_one(self, url: str, owner: str, kind: str, loc: Loc, body: Spool | None) -> str:
        """Fetch one file and return its name.

        Raises InvalidInput and InternalError, which name the field, and DiskFull.
        """
        try:
            with disk_errors():
                return await self._resolve(url, owner, kind, body)
        except InvalidInputFile as error:
            raise InvalidInput.of(error.type, ("body", *loc), str(error), url[:1000], **error.ctx) from None
        except InternalError as error:
            raise InternalError(f"{'.'.join(map(str, loc))}: {error}") from error

    def sweep(self) -> int:
        """Delete input files that are no longer needed, as `InputCache.sweep` does; return how many."""
        return self.cache.sweep()

    async def _resolve(self, url: str, owner: str, kind_name: str, body: Spool | None) -> str:
        kind, temp_path = self._kinds[kind_name], self.cache.temp_path()
        try:
            is_data = url[:5].lower() == "data:"
            if not is_data and (len(url) > MAX_URL or (body and body.is_in(url))):
                message = f"The URL is longer than {MAX_URL} characters; upload the file and send its URL"
                raise InvalidInputFile("file_download_error", message)
            if is_data and body and (data := body.find(url)):
                await self._executor.run(owner, data.link, temp_path, kind.max_bytes)
            elif is_data:
                await self._executor.run(owner, urls.decode_data_uri, url, temp_path, kind.max_bytes)
            elif own := urls.stored_file_name(url):
                await self._executor.run(owner, self._link, own, owner, temp_path, kind.max_bytes)
            else:
                return await self._download(url, owner, temp_path, kind_name)
            return await self._executor.run(owner, self._keep, temp_path, kind)
        finally:
            temp_path.unlink(missing_ok=True)

    async def _download(self, url: str, owner: str, temp_path: Path, kind_name: str) -> str:
        """Fetch a file from another server; return its name in the cache. Raises InvalidInputFile and OSError.

        The file is downloaded only if it changed since an earlier download, or is no longer in the cache.
        """
        kind = self._kinds[kind_name]
        async with self._downloads_of[owner], self._downloads:
            try:
                if kind_name != "image":
                    url = await hub.resolve_hub_id(url, self.outbound, temp_path)
                if not urls.has_scheme(url):
                    raise InvalidInputFile("file_download_error", urls.not_a_url_message(kind_name))
                # The key contains the kind, because a file that was fetched as an image was not checked as weights.
                cached = self._known.get((kind_name, url))
                is_here = cached is not None and await self._executor.run(owner, self.cache.touch, cached.name)
                etag = cached.etag if cached and is_here else ""
                new_etag = await self.outbound.download(
                    url, temp_path, kind.max_bytes, kind.max_seconds, etag, kind.accepts
                )
            except ForbiddenURL as error:
                raise InvalidInputFile("file_download_error", f"The file could not be downloaded: {error}") from None
        if new_etag is None and cached:
            return cached.name
        name = await self._executor.run(owner, self._keep, temp_path, kind)
        if new_etag and len(url) <= MAX_CACHED_URL:
            self._known[kind_name, url] = _CachedDownload(new_etag, name)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return name

    def _link(self, name: str, owner: str, to: Path, max_bytes: int) -> None:
        """Hard-link a file of this server's store to `to`. The link keeps the content if the store deletes the file.

        Raises InvalidInputFile for a file that the owner may not read or with more than `max_bytes`.
        """
        file = self._files.find(name)
        try:
            if file is None or (file.is_private and file.owner != owner):
                raise FileNotFoundError
            os.link(self._files.path(file), to)
        except FileNotFoundError:
            raise InvalidInputFile("file_download_error", "There is no such file on this server") from None
        if to.stat().st_size > max_bytes:
            raise too_large(max_bytes)

    def _keep(self, temp_path: Path, kind: InputType) -> str:
        """Check a file and move it into the cache; return its name. Raises InvalidInputFile."""
        ready = temp_path.with_suffix(".ready")
        try:
            return self.cache.add(ready, kind.store(temp_path, ready, self.limits))
        finally:
            ready.unlink(missing_ok=True)


def dump_input(request: ImageInput, input_files: Mapping[str, str], received: Spool | None = None) -> str:
    """Return a request as JSON for its row, with file names in place of data URIs, which may be large.

    Raises InvalidInput if the request has long base64 data in any other field.
    """
    body = request.model_dump(mode="json")
    for loc, _, url in input_urls(request):
        if url[:5].lower() == "data:":
            holder: Any = body
            for step in loc[:-1]:
                holder = holder[step]
            holder[loc[-1]] = input_files[".".join(map(str, loc))]
    text = str(to_json(body), "utf-8")
    if received and received.is_in(text):
        message = "Long base64 data is accepted only as data URIs of images and weights"
        raise InvalidInput.of("value_error", ("body",), message)
    return text


def _store_image(temp_path: Path, ready: Path, limits: Limits) -> str:
    """Decode an image and write it as a new PNG, which the engine reads."""
    images.decode_image(temp_path, limits).save(ready, "PNG", compress_level=1)
    return ".png"


def _store_weights(kind: str, temp_path: Path, ready: Path, limits: Limits) -> str:
    weights.check(kind, temp_path)
    temp_path.rename(ready)
    return WEIGHTS
