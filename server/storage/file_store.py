"""The file store: pictures and uploads under names nobody can guess."""

import dataclasses
import errno
import logging
import os
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

from server.errors import DiskFails, DiskFull
from server.storage.database import Database
from server.storage.durable import sync_directory

log = logging.getLogger(__name__)

#: What the system says when there is no more room.
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Bytes that a file takes at least, however small it is: a block, and its row.
_BLOCK = 4096
_NAME = re.compile(r"[0-9a-f]{32}\.[a-z0-9]{1,8}")
#: Also of one that is being written.
_SERVER_FILE = re.compile(rf"{_NAME.pattern}(\.part)?")


@dataclass(frozen=True)
class Lifecycle:
    """How long a file is kept, in seconds (None: as long as the operator keeps results), and who may read it."""

    lifetime: float | None = None
    is_private: bool = False


#: Kept as long as the operator keeps results, for everyone who has the name.
DEFAULT_LIFECYCLE = Lifecycle()


@dataclass(frozen=True)
class StoredFile:
    """A file in the store: its name is 128 random bits and an ending. `file_name` is what its owner called it."""

    name: str
    owner: str
    size: int
    content_type: str
    file_name: str | None = None
    is_private: bool = False
    expires_at: float | None = None


def disk_error(error: OSError) -> DiskFull:
    """What a client is told of an error of the system's."""
    return DiskFull() if error.errno in DISK_FULL_ERRNOS else DiskFails(f"{DiskFails.message}: {error.strerror}")


def counted_size(size: int) -> int:
    """Bytes that a file of this size counts as. The database's triggers count so too."""
    return max(size, _BLOCK)


def is_file_name(name: str) -> bool:
    """Whether a file of the store can have this name."""
    return bool(_NAME.fullmatch(name))


def generate_file_name(extension: str) -> str:
    """A name of 128 random bits: who has it was told it."""
    return f"{secrets.token_hex(16)}.{extension}"


def insert_file_row(connection: sqlite3.Connection, file: StoredFile, request_id: str | None, now: float) -> None:
    """Write a file's row, in the caller's transaction."""
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
    """Whether this server can have made it, under one of these names; a folder's ends with a slash."""
    return bool(names.fullmatch(f"{path.name}/" if path.is_dir() else path.name)) and not path.is_symlink()


def delete_orphans(directory: Path, names: re.Pattern[str], listed: Container[str]) -> int:
    """Delete what is ours and no row lists: a crash came between it and its row. At the start only."""
    strays = [path for path in directory.iterdir() if path.name not in listed and is_server_file(path, names)]
    for path in strays:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if strays:
        log.info("removed %d files that no row lists", len(strays))
    return len(strays)


class FileStore:
    """Files in one folder, each listed in the database; what is not listed is not served."""

    def __init__(self, directory: Path, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory
        self._database = database
        self._clock = clock
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def create(self, content: bytes, extension: str, content_type: str, owner: str, lifecycle: Lifecycle) -> StoredFile:
        """Put bytes on the disk for good; the caller lists the file when the job is finished. Raises DiskFull."""
        file = StoredFile(
            generate_file_name(extension), owner, len(content), content_type, is_private=lifecycle.is_private
        )
        return self.write(file, content, lifecycle)

    def write(self, file: StoredFile, content: bytes, lifecycle: Lifecycle) -> StoredFile:
        """As `save`, under the name that the file has; when it expires is counted from now. Raises DiskFull."""
        temp_path = self._directory / f"{file.name}.part"
        try:
            with temp_path.open("wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            self.move_in(temp_path, file.name)
        except OSError as error:
            temp_path.unlink(missing_ok=True)
            if error.errno in (*DISK_FULL_ERRNOS, errno.EROFS):
                raise disk_error(error) from error
            raise
        expires_at = None if lifecycle.lifetime is None else self._clock() + lifecycle.lifetime
        return dataclasses.replace(file, expires_at=expires_at)

    def move_in(self, path: Path, name: str) -> None:
        """Move a file that is on the disk already into the store, for good."""
        path.rename(self._directory / name)
        sync_directory(self._directory)

    def find(self, name: str) -> StoredFile | None:
        """A listed file that has not expired."""
        if not _NAME.fullmatch(name):
            return None
        rows = self._database.read(
            "SELECT name, owner, size, content_type, file_name, is_private, expires_at FROM files WHERE name = ?", name
        )
        if not rows or (rows[0]["expires_at"] is not None and rows[0]["expires_at"] <= self._clock()):
            return None
        return StoredFile(**{**dict(rows[0]), "is_private": bool(rows[0]["is_private"])})

    def is_listed(self, name: str) -> bool:
        """Whether a row lists a file of this name, be it expired."""
        return bool(self._database.read("SELECT 1 FROM files WHERE name = ?", name))

    def path(self, file: StoredFile) -> Path:
        """Where it lies."""
        return self._directory / file.name

    def delete(self, names: list[str]) -> None:
        """Delete from the disk; the caller has deleted the rows."""
        for name in names:
            (self._directory / name).unlink(missing_ok=True)

    def delete_orphans(self) -> int:
        """Of this store; returns how many."""
        listed = {row["name"] for row in self._database.read("SELECT name FROM files")}
        return delete_orphans(self._directory, _SERVER_FILE, listed)
