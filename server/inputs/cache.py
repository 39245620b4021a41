"""Input files of requests, named by the hash of their content.

Images are kept while an unfinished request needs them. LoRAs and other weights are kept longer, as long as they
fit --loras-gb.
"""

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
WEIGHTS = ".safetensors"
#: The directory of input files in the data directory.
INPUTS = "inputs"
#: The names of complete files, and of files that are being written.
_SERVER_FILE = re.compile(r"[0-9a-f]{64}\.(png|safetensors)|[0-9a-f]{16}\.(part|ready)")


class InputCache:
    """A directory of input files. Files appear whole or not at all, and the same content is stored once.

    `in_use` returns the names of the files that unfinished requests need. LoRAs that no request needs are kept too,
    while all LoRAs together take at most `max_kept_bytes`.
    """

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
        #: How many requests pin each file, by name.
        self._pinned: Counter[str] = Counter()
        # Held while a file is checked and then touched or deleted, so that a sweep spares a file that was just touched.
        self._lock = threading.Lock()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, name: str) -> Path:
        """Return the path of the input file with this name."""
        return self._directory / name

    def size(self, name: str) -> int:
        """Return the size of the input file with this name in bytes; 0 if it does not exist."""
        return size_of(self._directory, name)

    def temp_path(self) -> Path:
        """Return a new path for a file that is not complete yet."""
        return self._directory / f"{secrets.token_hex(8)}.part"

    def add(self, ready: Path, extension: str) -> str:
        """Move a complete file into the cache, durably, and return its name. Raises OSError.

        The name is the SHA-256 of the content, followed by `extension`.
        """
        with ready.open("rb") as file:
            name = f"{hashlib.file_digest(file, 'sha256').hexdigest()}{extension}"
            os.fsync(file.fileno())
        with self._lock:
            # The file may be a link to an old upload, and a sweep deletes files whose time is old.
            os.utime(ready)
            ready.rename(self.path(name))
        sync_directory(self._directory)
        return name

    def touch(self, name: str) -> bool:
        """Set a file's time to now, so that no sweep deletes it soon; return whether the file exists."""
        with self._lock:
            try:
                os.utime(self.path(name))
            except FileNotFoundError:
                return False
            return True

    @contextmanager
    def pin(self) -> Iterator[Callable[[str], None]]:
        """Yield a function that pins a file by name.

        No sweep deletes a pinned file during the block, or within GRACE_SECONDS after it.
        """
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
        """Delete files that no unfinished request needs, unless they are pinned or were just used; return how many.

        LoRAs are deleted only while all LoRAs together exceed `max_kept_bytes`, the least recently used first.
        """
        needed = self._in_use()
        paths = (path for path in self._directory.iterdir() if is_server_file(path, _SERVER_FILE))
        idle = sorted((path for path in paths if path.name not in needed), key=_used_at)
        excess = sum(self.size(path.name) for path in self._directory.glob(f"*{WEIGHTS}")) - self.max_kept_bytes
        num_deleted = 0
        for path in idle:
            if path.suffix == WEIGHTS and excess <= 0:
                continue
            size = self.size(path.name)
            if self._delete(path):
                num_deleted += 1
                excess -= size if path.suffix == WEIGHTS else 0
        return num_deleted

    def _delete(self, path: Path) -> bool:
        """Delete a file, unless it is pinned or was used within GRACE_SECONDS; return whether it was deleted."""
        with self._lock:
            if path.name in self._pinned or _used_at(path) >= self._clock() - GRACE_SECONDS:
                return False
            path.unlink(missing_ok=True)
            return True


def size_of(directory: Path, name: str) -> int:
    """Return the size of an input file in bytes; 0 if it does not exist."""
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
