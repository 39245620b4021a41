"""Input files of requests: content-addressed, and kept while a request needs them."""

import hashlib
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from server.storage.durable import sync_directory
from server.storage.file_store import is_server_file

#: A file that was used within this many seconds is not swept, because its request may not be accepted yet.
GRACE_SECONDS = 600.0
LORA = ".safetensors"
#: The directory of input files in the data directory.
INPUTS = "inputs"
#: Complete files, and files that are being written.
_SERVER_FILE = re.compile(r"[0-9a-f]{64}\.(png|safetensors)|[0-9a-f]{16}\.(part|ready)")


class InputCache:
    """A directory of input files. Files appear whole or not at all, and the same content is stored once."""

    def __init__(
        self,
        directory: Path,
        in_use: Callable[[], set[str]],
        max_kept_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._in_use = in_use
        self.max_kept_bytes = max_kept_bytes
        self._clock = clock
        #: Names of the files that are pinned, and how often.
        self._pinned: Counter[str] = Counter()
        # Held while a file is checked and then touched or deleted, so that a new file is not swept away.
        self._lock = threading.Lock()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, name: str) -> Path:
        """Return a file's path."""
        return self._directory / name

    def temp_path(self) -> Path:
        """Return a new path for a file that is not complete yet."""
        return self._directory / f"{secrets.token_hex(8)}.part"

    def add(self, ready: Path, extension: str) -> str:
        """Store a complete file durably under the hash of its content; return the name."""
        with ready.open("rb") as file:
            name = f"{hashlib.file_digest(file, 'sha256').hexdigest()}{extension}"
            os.fsync(file.fileno())
        with self._lock:
            # A linked upload may have an old time, and the sweep goes by the time.
            os.utime(ready)
            ready.rename(self.path(name))
        sync_directory(self._directory)
        return name

    def touch(self, name: str) -> bool:
        """Mark a file as used now; return whether it exists."""
        with self._lock:
            try:
                os.utime(self.path(name))
            except FileNotFoundError:
                return False
            return True

    @contextmanager
    def pin(self) -> Iterator[Callable[[str], None]]:
        """Keep files from being swept while a request is being accepted. Yields a function that pins a name."""
        names: list[str] = []

        def hold(name: str) -> None:
            with self._lock:
                self._pinned[name] += 1
            names.append(name)

        try:
            yield hold
        finally:
            for name in names:
                self.touch(name)
            with self._lock:
                self._pinned.subtract(names)
                self._pinned += Counter()

    def sweep(self) -> int:
        """Delete files that no unfinished request needs; return how many.

        Images go at once. LoRAs go, least recently used first, until they fit the limit.
        """
        needed = self._in_use()
        paths = (path for path in self._directory.iterdir() if is_server_file(path, _SERVER_FILE))
        idle = sorted((path for path in paths if path.name not in needed), key=_used_at)
        excess = sum(self._size(path.name) for path in self._directory.glob(f"*{LORA}")) - self.max_kept_bytes
        num_deleted = 0
        for path in idle:
            if path.suffix == LORA and excess <= 0:
                continue
            size = self._size(path.name)
            if self._delete(path):
                num_deleted += 1
                excess -= size if path.suffix == LORA else 0
        return num_deleted

    def _delete(self, path: Path) -> bool:
        """Delete a file, unless it is pinned or was used recently; return whether it was deleted."""
        with self._lock:
            if path.name in self._pinned or _used_at(path) >= self._clock() - GRACE_SECONDS:
                return False
            path.unlink(missing_ok=True)
            return True

    def _size(self, name: str) -> int:
        return size_of(self._directory, name)


def size_of(directory: Path, name: str) -> int:
    """Return the bytes of an input file; 0 if it does not exist."""
    try:
        return (directory / name).stat().st_size
    except FileNotFoundError:
        return 0


def _used_at(path: Path) -> float:
    """Return when a file was last used, in seconds since 1970; 0 if it no longer exists."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
