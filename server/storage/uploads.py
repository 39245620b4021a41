"""Uploads in parts: the parts of a file are stored on the disk, then joined into one file in the store."""

import contextlib
import hashlib
import mimetypes
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path, PurePath

from server.errors import BadRequest, BodyTooLarge, DiskFull, NotFound, QueueFull, TooManyRequests
from server.executor import FairExecutor
from server.storage.database import Database
from server.storage.file_store import (
    EXTENSION,
    FileStore,
    Lifecycle,
    StoredFile,
    delete_orphans,
    disk_error,
    generate_file_name,
    insert_file_row,
)
from server.storage.multipart import PartsInFlight, PendingUploads, Upload, join, sizes_in

#: How long an upload may take from its creation to its completion, in seconds.
LIFETIME = 86_400.0
#: Amazon S3's limit on the number of parts, which fal's clients respect.
MAX_PARTS = 10_000
#: How many unfinished uploads one owner may have.
MAX_PENDING_UPLOADS = 1_000
#: How many uploaded files and parts of unfinished uploads one owner may have.
MAX_FILES = 20_000
#: The names of the directory of an upload's parts, and of the file that the parts are joined into.
_SERVER_FILE = re.compile(r"[0-9a-f]{32}/|[0-9a-f]{16}\.whole")


class Uploads:
    """The unfinished uploads, limited in bytes per file, and in bytes and number per owner.

    Parts may come in any order. A part that is sent again replaces the earlier one.
    """

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
        # Held during each change of `_pending` and the matching change on the disk.
        self._lock = threading.Lock()
        #: Only the event loop's thread uses this object.
        self._in_flight = PartsInFlight()
        # Separate threads, so that large files do not delay new requests.
        self.executor = FairExecutor("uploads", 8, 2)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        rows = database.read("SELECT * FROM uploads")
        delete_orphans(directory, _SERVER_FILE, {row["upload_id"] for row in rows})
        for row in rows:
            self._pending.add(_upload(row), sizes_in(directory / row["upload_id"]))

    def create(self, owner: str, content_type: str, file_name: str, lifecycle: Lifecycle) -> Upload:
        """Start and return an upload, with a new name for its file in the store.

        Raises QueueFull for too many unfinished uploads, TooManyRequests for too many files, and DiskFull.
        """
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
                raise QueueFull(f"This key already has {MAX_PENDING_UPLOADS} unfinished uploads; finish some first")
            self._check_number(owner)
            self._pending.add(upload)
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
        """Return an unfinished upload. Raises NotFound if it has ended, is too old or never existed."""
        upload = self._pending.find(upload_id)
        if upload is None or upload.created_at <= self._clock() - LIFETIME:
            raise NotFound("There is no such upload, or it has ended")
        return upload

    async def write_part(self, upload: Upload, part_number: int, chunks: AsyncIterator[bytes]) -> str:
        """Write one part as it arrives; return its ETag, the MD5 hash in quotation marks.

        Raises BadRequest for an invalid part number, BodyTooLarge for too many bytes, TooManyRequests for too many
        parts, NotFound for an upload that has ended, and DiskFull.
        """
        if not 1 <= part_number <= MAX_PARTS:
            raise BadRequest(f"The part number should be from 1 to {MAX_PARTS}")
        file_room, owner_room = await self.executor.run(upload.owner, self._rooms, upload, part_number)
        temp_path = self._parts(upload) / f"{secrets.token_hex(8)}.part"
        digest, size = hashlib.md5(usedforsecurity=False), 0
        try:
            file = await self.executor.run(upload.owner, temp_path.open, "wb")
            try:
                async for chunk in chunks:
                    size += len(chunk)
                    of_file, of_owner = self._in_flight.add(upload, len(chunk))
                    if of_file > file_room or of_owner > owner_room:
                        raise BodyTooLarge(self._limit_message())
                    digest.update(chunk)
                    await self.executor.run(upload.owner, file.write, chunk)
            finally:
                await self.executor.run(upload.owner, file.close)
            await self.executor.run(upload.owner, self._take, upload, part_number, temp_path, size)
        except FileNotFoundError:
            raise NotFound("There is no such upload, or it has ended") from None
        except OSError as error:
            raise disk_error(error) from error
        finally:
            self._in_flight.subtract(upload, size)
            temp_path.unlink(missing_ok=True)
        return f'"{digest.hexdigest()}"'

    async def complete(self, upload: Upload, part_numbers: Sequence[int] | None = None) -> StoredFile:
        """Join the listed parts, or all if none are listed; return the file, which is served from now on.

        The parts are joined in the order of their numbers. Raises BadRequest when a listed part was not sent, NotFound
        for an upload that has ended, and DiskFull.
        """
        return await self.executor.run(upload.owner, self._join, upload, part_numbers)

    def _join(self, upload: Upload, part_numbers: Sequence[int] | None = None) -> StoredFile:
        directory = self._parts(upload)
        stored = self._pending.parts(upload.upload_id)
        numbers = sorted(set(part_numbers)) if part_numbers else stored
        if missing := sorted(set(numbers) - set(stored)):
            raise BadRequest(f"Part {missing[0]} was not sent")
        whole = self._directory / f"{secrets.token_hex(8)}.whole"
        try:
            size = join([directory / str(number) for number in numbers], whole)
            file = self._add_to_store(upload, whole, size)
        except FileNotFoundError:
            raise NotFound("There is no such upload, or it has ended") from None
        except OSError as error:
            raise disk_error(error) from error
        finally:
            whole.unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        return file

    def abort(self, upload: Upload) -> None:
        """End an upload and delete its parts. If the disk is full, `sweep` deletes its row later."""
        with contextlib.suppress(DiskFull), self._database.transaction() as connection:
            connection.execute("DELETE FROM uploads WHERE upload_id = ?", (upload.upload_id,))
        self._end(upload.upload_id)

    def sweep(self) -> int:
        """Delete uploads that were not finished within LIFETIME; return how many."""
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

    def _add_to_store(self, upload: Upload, whole: Path, size: int) -> StoredFile:
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
        # Under one lock, so that the bytes do not count as parts and as a file at the same time.
        with self._lock:
            with self._database.transaction() as connection:
                if connection.execute("DELETE FROM uploads WHERE upload_id = ?", (upload.upload_id,)).rowcount != 1:
                    raise NotFound("There is no such upload, or it has ended")
                self._files.move_in(whole, upload.name)
                insert_file_row(connection, file, None, now)
            self._pending.end(upload.upload_id)
        return file

    def _rooms(self, upload: Upload, part_number: int) -> tuple[int, int]:
        """Return the most bytes that this part may have: by the limit for one file, and by the limit for its owner.

        Raises TooManyRequests for too many files and parts.
        """
        if not self._pending.has(upload.upload_id, part_number):
            self._check_number(upload.owner)
        old_size = self._pending.size(upload.upload_id, part_number)
        of_this = self._max_bytes - self._pending.size(upload.upload_id)
        of_owner = (
            self._max_bytes_per_owner - self._stored_totals(upload.owner)[1] - self._pending.num_bytes[upload.owner]
        )
        return of_this + old_size, of_owner + old_size

    def _take(self, upload: Upload, part_number: int, temp_path: Path, size: int) -> None:
        """Check the limits again, and store a received part. Other parts may have been stored meanwhile.

        Raises BodyTooLarge, TooManyRequests, and FileNotFoundError for an upload that has ended.
        """
        with self._lock:
            if self._pending.find(upload.upload_id) is None:
                raise FileNotFoundError
            if size > min(self._rooms(upload, part_number)):
                raise BodyTooLarge(self._limit_message())
            temp_path.rename(self._parts(upload) / str(part_number))
            self._pending.put(upload.upload_id, part_number, size)

    def _end(self, upload_id: str) -> None:
        with self._lock:
            self._pending.end(upload_id)
        shutil.rmtree(self._directory / upload_id, ignore_errors=True)

    def _check_number(self, owner: str) -> None:
        num_pending = self._pending.num_uploads[owner] + self._pending.num_parts[owner]
        if self._stored_totals(owner)[0] + num_pending >= MAX_FILES:
            raise TooManyRequests(
                f"This key already has {MAX_FILES} uploaded files and parts; try again when some have expired"
            )

    def _stored_totals(self, owner: str) -> tuple[int, int]:
        """Return the number and the total bytes of an owner's uploaded files."""
        rows = self._database.read("SELECT num_uploads, upload_bytes FROM kept WHERE owner = ?", owner)
        return (rows[0]["num_uploads"], rows[0]["upload_bytes"]) if rows else (0, 0)

    def _limit_message(self) -> str:
        return (
            f"The upload exceeds the limit for one file ({self._max_bytes} bytes)"
            f" or for all files of this key ({self._max_bytes_per_owner} bytes)"
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
    return next((extension for extension in (named, guessed) if EXTENSION.fullmatch(extension)), "bin")


def _clean(text: str) -> str:
    """Remove unprintable characters, which would break a header."""
    return "".join(character for character in text if character.isprintable()).strip()


def _type(text: str) -> str:
    cleaned = _clean(text)
    return cleaned if cleaned and cleaned.isascii() else "application/octet-stream"
