"""The file store: images and uploads under names that cannot be guessed."""

import dataclasses
import errno
import logging
import os
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from server.errors import DiskFails, DiskFull
from server.storage.database import Database
from server.storage.durable import sync_directory

log = logging.getLogger(__name__)

#: The system's error numbers for a full disk.
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: A file counts as at least this many bytes, because it takes a disk block and a row.
_BLOCK = 4096
#: The extension of a name. An upload keeps that of its own name if it fits; the longest common one is "safetensors".
EXTENSION = re.compile(r"[a-z0-9]{1,16}")
NAME = re.compile(rf"[0-9a-f]{{32}}\.{EXTENSION.pattern}")
#: Also matches a file that is being written.
_SERVER_FILE = re.compile(rf"{NAME.pattern}(\.part)?")


@dataclass(frozen=True)
class Lifecycle:
    """The lifetime of a file in seconds, and whether the file is private. Only its owner may read a private file.

    A file whose lifetime is None is kept as long as the operator keeps results.
    """

    lifetime: float | None = None
    is_private: bool = False


#: Kept as long as the operator keeps results; any client that knows the name may read the file.
DEFAULT_LIFECYCLE = Lifecycle()


@dataclass(frozen=True)
class StoredFile:
    """A file in the store. `name` is 128 random bits and an extension; `file_name` is the name that an uploader gave.

    `size` is in bytes, `expires_at` in seconds since 1970.
    """

    name: str
    owner: str
    size: int
    content_type: str
    file_name: str | None = None
    is_private: bool = False
    expires_at: float | None = None


def disk_error(error: OSError) -> DiskFull:
    """Convert a system error: DiskFull if the disk is full, otherwise DiskFails with the system's message."""
    return DiskFull() if error.errno in DISK_FULL_ERRNOS else DiskFails.because(error.strerror)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Convert the system errors of a full or read-only disk to DiskFull. Raises all other errors as they are."""
    try:
        yield
    except OSError as error:
        if error.errno in (*DISK_FULL_ERRNOS, errno.EROFS):
            raise disk_error(error) from error
        raise


def counted_size(size: int) -> int:
    """Return the bytes that a file of this size counts as. The database's triggers use the same rule."""
    return max(size, _BLOCK)


def is_file_name(name: str) -> bool:
    """Return whether a file of the store can have this name."""
    return bool(NAME.fullmatch(name))


def generate_file_name(extension: str) -> str:
    """Generate a name that cannot be guessed: 128 random bits and the extension."""
    return f"{secrets.token_hex(16)}.{extension}"


def insert_file_row(connection: sqlite3.Connection, file: StoredFile, request_id: str | None, now: float) -> None:
    """Insert a file's row, in the caller's transaction. An upload has no `request_id`."""
    connection.execute(
        "INSERT INTO files (name, request_id, owner, size, content_type, file_name, is_private, created_at, expires_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            file.name,
            request_id,
            file.owner,
            file.size,
            file.content_type,
            file.file_name,
            file.is_private,
            now,
            file.expires_at,
        ),
    )


def is_server_file(path: Path, names: re.Pattern[str]) -> bool:
    """Return whether the path's name matches `names`, the pattern of names that this server gives.

    A directory is matched with a slash after its name. A symbolic link never matches.
    """
    return bool(names.fullmatch(f"{path.name}/" if path.is_dir() else path.name)) and not path.is_symlink()


def delete_orphans(directory: Path, names: re.Pattern[str], listed: Container[str]) -> int:
    """Delete the files and directories that match `names` but are not listed; return how many.

    A crash leaves such files if it happens before their row is written. Call at startup only.
    """
    orphans = [path for path in directory.iterdir() if path.name not in listed and is_server_file(path, names)]
    for path in orphans:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if orphans:
        log.info(
            "removed %d files from %s that no row lists; a crash or a backup leaves such files", len(orphans), directory
        )
    return len(orphans)


class FileStore:
    """A directory of files that are listed in the database. Other files in the directory are not served."""

    def __init__(self, directory: Path, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory
        self._database = database
        self._clock = clock
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def create(self, content: bytes, extension: str, content_type: str, owner: str, lifecycle: Lifecycle) -> StoredFile:
        """Write bytes durably under a new name; return the file. The caller must insert the row. Raises as `write`."""
        file = StoredFile(
            generate_file_name(extension), owner, len(content), content_type, is_private=lifecycle.is_private
        )
        return self.write(file, content, lifecycle)

    def write(self, file: StoredFile, content: bytes, lifecycle: Lifecycle) -> StoredFile:
        """Write bytes durably under the file's name; return the file with its expiry, counted from now.

        Raises DiskFull, also for a read-only disk, and OSError for other faults.
        """
        temp_path = self._directory / f"{file.name}.part"
        with disk_errors():
            try:
                with temp_path.open("wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                self.move_in(temp_path, file.name)
            except OSError:
                temp_path.unlink(missing_ok=True)
                raise
        expires_at = None if lifecycle.lifetime is None else self._clock() + lifecycle.lifetime
        return dataclasses.replace(file, expires_at=expires_at)

    def move_in(self, path: Path, name: str) -> None:
        """Move a file whose content is already on the disk into the store, durably. Raises OSError."""
        path.rename(self._directory / name)
        sync_directory(self._directory)

    def find(self, name: str) -> StoredFile | None:
        """Return the listed file of this name, or None if there is none or it has expired."""
        if not NAME.fullmatch(name):
            return None
        rows = self._database.read(
            "SELECT name, owner, size, content_type, file_name, is_private, expires_at FROM files WHERE name = ?", name
        )
        if not rows or (rows[0]["expires_at"] is not None and rows[0]["expires_at"] <= self._clock()):
            return None
        return StoredFile(**{**dict(rows[0]), "is_private": bool(rows[0]["is_private"])})

    def is_listed(self, name: str) -> bool:
        """Return whether a row lists a file of this name, expired or not."""
        return bool(self._database.read("SELECT 1 FROM files WHERE name = ?", name))

    def path(self, file: StoredFile) -> Path:
        """Return the path of a file on the disk."""
        return self._directory / file.name

    def delete(self, names: list[str]) -> None:
        """Delete files from the disk, after the caller has deleted their rows."""
        for name in names:
            (self._directory / name).unlink(missing_ok=True)

    def delete_orphans(self) -> int:
        """Delete files in the store that no row lists; return how many. Call at startup only."""
        listed = {row["name"] for row in self._database.read("SELECT name FROM files")}
        return delete_orphans(self._directory, _SERVER_FILE, listed)
