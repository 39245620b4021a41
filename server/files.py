"""The file store: pictures under names nobody can guess."""

import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from server.database import Database
from server.errors import DiskFull
from server.jobs import StoredFile

_NAME = re.compile(r"[0-9a-f]{32}\.[a-z]{3,4}")


class Files:
    """Files in one folder, each listed in the database; what is not listed is not served."""

    def __init__(self, folder: Path, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._database = database
        self._clock = clock
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def save(self, content: bytes, ending: str, content_type: str, lifetime: float | None) -> StoredFile:
        """Put bytes on the disk for good; the caller lists the file when the job is finished. Raises DiskFull."""
        name = f"{secrets.token_hex(16)}.{ending}"
        aside = self._folder / f"{name}.part"
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(self._folder / name)
            self._sync_folder()
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise DiskFull from error
        expires_at = self._clock() + lifetime if lifetime is not None else None
        return StoredFile(name, len(content), content_type, expires_at)

    def open(self, name: str) -> tuple[Path, str] | None:
        """Path and content type of a listed file that has not expired."""
        if not _NAME.fullmatch(name):
            return None
        rows = self._database.read("SELECT content_type, expires_at FROM files WHERE name = ?", name)
        if not rows or (rows[0]["expires_at"] is not None and rows[0]["expires_at"] <= self._clock()):
            return None
        return self._folder / name, rows[0]["content_type"]

    def remove(self, names: list[str]) -> None:
        """Delete from the disk; the caller has deleted the rows."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def remove_strays(self) -> int:
        """Delete what no row lists: a crash came between a file and its row. At the start only."""
        listed = {row["name"] for row in self._database.read("SELECT name FROM files")}
        strays = [path.name for path in self._folder.iterdir() if path.name not in listed]
        self.remove(strays)
        return len(strays)

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
