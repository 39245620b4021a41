"""Uploads under way: parts on the disk that become one file in the store."""

import contextlib
import hashlib
import mimetypes
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path, PurePath

from server.errors import BadRequest, BodyTooLarge, DiskFull, NotFound, QueueFull, TooManyRequests
from server.executor import FairExecutor
from server.storage.database import Database
from server.storage.file_store import (
    FileStore,
    Lifecycle,
    StoredFile,
    delete_orphans,
    disk_error,
    generate_file_name,
    insert_file_row,
)
from server.storage.multipart import PendingUploads, Upload, join, sizes_in

#: How long an upload may take from its first word to its last, in seconds.
LIFETIME = 86_400.0
#: Amazon's bound on parts, which fal's clients keep to.
MAX_PARTS = 10_000
#: How many uploads one owner may have begun and not finished.
MAX_PENDING_UPLOADS = 1_000
#: How many files one owner may have uploaded, and parts of files under way.
MAX_FILES = 20_000
_EXTENSION = re.compile(r"[a-z0-9]{1,8}")
#: The folder of an upload's parts, and what they are joined in.
_OURS = re.compile(r"[0-9a-f]{32}/|[0-9a-f]{16}\.whole")


class Uploads:
    """Bounded per file and per owner. A part that is sent twice counts once; parts may come in any order."""

    def __init__(
        self,
        directory: Path,
        database: Database,
        files: FileStore,
        *,
        max_bytes: int,
        max_bytes_per_owner: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._database = database
        self._files = files
        self._max_bytes = max_bytes
        self._max_bytes_per_owner = max_bytes_per_owner
        self._clock = clock
        self._pending = PendingUploads()
        # Over every change of it, and the change on the disk that belongs to it.
        self._lock = threading.Lock()
        #: Bytes of parts that are on their way, by owner; touched by the event loop alone.
        self._in_flight: Counter[str] = Counter()
        # Threads of their own, so that large files keep nobody's submit waiting.
        self.executor = FairExecutor("uploads", 8, 2)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        rows = database.read("SELECT * FROM uploads")
        delete_orphans(directory, _OURS, {row["upload_id"] for row in rows})
        for row in rows:
            self._pending.begin(_upload(row), sizes_in(directory / row["upload_id"]))

    def create(self, owner: str, content_type: str, file_name: str, lifecycle: Lifecycle) -> Upload:
        """Expect a file; its name in the store is known from now on. Raises QueueFull, TooManyRequests and DiskFull."""
        upload = Upload(
            upload_id=secrets.token_hex(16),
            name=generate_file_name(_extension(file_name, content_type)),
            owner=owner,
            content_type=_type(content_type),
            file_name=_clean(file_name)[:255] or "file",
            lifecycle=lifecycle,
            created_at=self._clock(),
        )
        with self._lock:
            if self._pending.num_uploads[owner] >= MAX_PENDING_UPLOADS:
                raise QueueFull(f"{MAX_PENDING_UPLOADS} uploads are under way already; finish some first")
            self._check_number(owner)
            self._pending.begin(upload)
        try:
            self._parts(upload).mkdir(mode=0o700)
            self._insert(upload)
        except BaseException as error:
            self._end(upload.upload_id)
            if isinstance(error, OSError):
                raise disk_error(error) from error
            raise
        return upload

    def find(self, upload_id: str) -> Upload:
        """An upload under way. Raises NotFound."""
        upload = self._pending.find(upload_id)
        if upload is None or upload.created_at <= self._clock() - LIFETIME:
            raise NotFound("There is no such upload, or it is over")
        return upload

    async def write_part(self, upload: Upload, part_number: int, chunks: AsyncIterator[bytes]) -> str:
        """Write one part as it comes; returns its ETag.

        Raises BodyTooLarge and TooManyRequests, naming the limit, BadRequest, NotFound where it is over, and DiskFull.
        """
        if not 1 <= part_number <= MAX_PARTS:
            raise BadRequest(f"The part number should be from 1 to {MAX_PARTS}")
        room = await self.executor.run(upload.owner, self._room, upload, part_number)
        temp_path = self._parts(upload) / f"{secrets.token_hex(8)}.part"
        digest, size = hashlib.md5(usedforsecurity=False), 0
        try:
            file = await self.executor.run(upload.owner, temp_path.open, "wb")
            try:
                async for chunk in chunks:
                    size += len(chunk)
                    self._in_flight[upload.owner] += len(chunk)
                    if self._in_flight[upload.owner] > room:
                        raise BodyTooLarge(self._limit_words())
                    digest.update(chunk)
                    await self.executor.run(upload.owner, file.write, chunk)
            finally:
                await self.executor.run(upload.owner, file.close)
            await self.executor.run(upload.owner, self._take, upload, part_number, temp_path, size)
        except FileNotFoundError:
            raise NotFound("There is no such upload, or it is over") from None
        except OSError as error:
            raise disk_error(error) from error
        finally:
            self._in_flight[upload.owner] -= size
            temp_path.unlink(missing_ok=True)
        return f'"{digest.hexdigest()}"'

    async def complete_single(self, upload: Upload, part_numbers: Sequence[int] | None = None) -> StoredFile:
        """As `complete`, off the event loop."""
        return await self.executor.run(upload.owner, self.complete, upload, part_numbers)

    def complete(self, upload: Upload, part_numbers: Sequence[int] | None = None) -> StoredFile:
        """Join the parts, in order whatever order they are listed in, into a file that is served from now on.

        Raises BadRequest when a listed part was not sent, NotFound where it is over, and DiskFull.
        """
        directory = self._parts(upload)
        sent = self._pending.parts(upload.upload_id)
        wanted = sorted(set(part_numbers)) if part_numbers else sent
        if missing := sorted(set(wanted) - set(sent)):
            raise BadRequest(f"Part {missing[0]} was not sent")
        whole = self._directory / f"{secrets.token_hex(8)}.whole"
        try:
            size = join([directory / str(number) for number in wanted], whole)
            file = self._listed(upload, whole, size)
        except FileNotFoundError:
            raise NotFound("There is no such upload, or it is over") from None
        except OSError as error:
            raise disk_error(error) from error
        finally:
            whole.unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        return file

    def abort(self, upload: Upload) -> None:
        """Give up one that nobody can finish. On a full disk that is left to the sweep."""
        with contextlib.suppress(DiskFull), self._database.transaction() as connection:
            connection.execute("DELETE FROM uploads WHERE upload_id = ?", (upload.upload_id,))
        self._end(upload.upload_id)

    def sweep(self) -> int:
        """Forget uploads that were not finished in time; returns how many."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                "DELETE FROM uploads WHERE created_at <= ? RETURNING upload_id", (self._clock() - LIFETIME,)
            ).fetchall()
        for row in rows:
            self._end(row["upload_id"])
        return len(rows)

    def _insert(self, upload: Upload) -> None:
        values = (
            upload.upload_id,
            upload.name,
            upload.owner,
            upload.content_type,
            upload.file_name,
            upload.lifecycle.is_private,
            upload.lifecycle.lifetime,
            upload.created_at,
        )
        with self._database.transaction() as connection:
            connection.execute("INSERT INTO uploads VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)

    def _listed(self, upload: Upload, whole: Path, size: int) -> StoredFile:
        now = self._clock()
        lifetime = upload.lifecycle.lifetime
        file = StoredFile(
            upload.name,
            upload.owner,
            size,
            upload.content_type,
            upload.file_name,
            upload.lifecycle.is_private,
            None if lifetime is None else now + lifetime,
        )
        # Together, so that nobody counts its bytes twice.
        with self._lock:
            with self._database.transaction() as connection:
                if connection.execute("DELETE FROM uploads WHERE upload_id = ?", (upload.upload_id,)).rowcount != 1:
                    raise NotFound("There is no such upload, or it is over")
                self._files.move_in(whole, upload.name)
                insert_file_row(connection, file, None, now)
            self._pending.end(upload.upload_id)
        return file

    def _room(self, upload: Upload, part_number: int) -> int:
        """How many bytes this part may have. Raises TooManyRequests."""
        if not self._pending.has(upload.upload_id, part_number):
            self._check_number(upload.owner)
        known = self._pending.size(upload.upload_id, part_number)
        of_this = self._max_bytes - self._pending.size(upload.upload_id)
        of_owner = self._max_bytes_per_owner - self._kept(upload.owner)[1] - self._pending.num_bytes[upload.owner]
        return min(of_this, of_owner) + known

    def _take(self, upload: Upload, part_number: int, temp_path: Path, size: int) -> None:
        """Keep a part; parts that came at the same time are weighed one after the other. Raises FileNotFoundError."""
        with self._lock:
            if self._pending.find(upload.upload_id) is None:
                raise FileNotFoundError
            if size > self._room(upload, part_number):
                raise BodyTooLarge(self._limit_words())
            temp_path.rename(self._parts(upload) / str(part_number))
            self._pending.put(upload.upload_id, part_number, size)

    def _end(self, upload_id: str) -> None:
        with self._lock:
            self._pending.end(upload_id)
        shutil.rmtree(self._directory / upload_id, ignore_errors=True)

    def _check_number(self, owner: str) -> None:
        under_way = self._pending.num_uploads[owner] + self._pending.num_parts[owner]
        if self._kept(owner)[0] + under_way >= MAX_FILES:
            message = (
                f"This key has {MAX_FILES} files and parts of files uploaded, the most; it can once some have expired"
            )
            raise TooManyRequests(message)

    def _kept(self, owner: str) -> tuple[int, int]:
        """How many files of an owner's uploads there are, and their bytes."""
        rows = self._database.read("SELECT num_uploads, upload_bytes FROM kept WHERE owner = ?", owner)
        return (rows[0]["num_uploads"], rows[0]["upload_bytes"]) if rows else (0, 0)

    def _limit_words(self) -> str:
        return (
            f"The upload is larger than a file may be ({self._max_bytes} bytes)"
            f" or than what is left for this key ({self._max_bytes_per_owner} bytes in all)"
        )

    def _parts(self, upload: Upload) -> Path:
        return self._directory / upload.upload_id


def _upload(row: sqlite3.Row) -> Upload:
    lifecycle = Lifecycle(row["lifetime"], bool(row["is_private"]))
    return Upload(
        row["upload_id"], row["name"], row["owner"], row["content_type"], row["file_name"], lifecycle, row["created_at"]
    )


def _extension(file_name: str, content_type: str) -> str:
    named = PurePath(file_name).suffix.lower().removeprefix(".")
    guessed = (mimetypes.guess_extension(content_type.partition(";")[0].strip()) or ".bin").removeprefix(".")
    return next((extension for extension in (named, guessed) if _EXTENSION.fullmatch(extension)), "bin")


def _clean(text: str) -> str:
    """Without what would break a header."""
    return "".join(character for character in text if character.isprintable()).strip()


def _type(text: str) -> str:
    cleaned = _clean(text)
    return cleaned if cleaned and cleaned.isascii() else "application/octet-stream"
