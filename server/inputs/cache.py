"""The files that requests bring along, each named by what is in it: kept while a request needs them."""

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

#: What was used so shortly ago is left alone: its request is being accepted.
GRACE_SECONDS = 600.0
LORA = ".safetensors"
#: The folder of what was brought, in the data folder.
INPUTS = "inputs"
#: What was brought, and what is on its way.
_SERVER_FILE = re.compile(r"[0-9a-f]{64}\.(png|safetensors)|[0-9a-f]{16}\.(part|ready)")


class InputCache:
    """A folder. Its files appear whole or not at all, and the same content is kept once."""

    def __init__(
        self,
        directory: Path,
        needed: Callable[[], set[str]],
        max_kept_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._in_use = needed
        self.max_kept_bytes = max_kept_bytes
        self._clock = clock
        #: Names that requests on their way have brought already.
        self._held: Counter[str] = Counter()
        # Over a look at a file and what is done about it, so that what has just come is not swept away.
        self._lock = threading.Lock()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return self._directory / name

    def temp_path(self) -> Path:
        """Where something may be written that is not ready yet."""
        return self._directory / f"{secrets.token_hex(8)}.part"

    def add(self, ready: Path, extension: str) -> str:
        """Put a file into the place that its own bytes name, for good; returns the name."""
        with ready.open("rb") as file:
            name = f"{hashlib.file_digest(file, 'sha256').hexdigest()}{extension}"
            os.fsync(file.fileno())
        with self._lock:
            # An upload that is linked here may be old, and the sweep goes by that.
            os.utime(ready)
            ready.rename(self.path(name))
        sync_directory(self._directory)
        return name

    def touch(self, name: str) -> bool:
        """Whether a file is here; it counts as used now."""
        with self._lock:
            try:
                os.utime(self.path(name))
            except FileNotFoundError:
                return False
            return True

    @contextmanager
    def pin(self) -> Iterator[Callable[[str], None]]:
        """For a request on its way: what it names stays, however long the rest of it takes."""
        names: list[str] = []

        def hold(name: str) -> None:
            with self._lock:
                self._held[name] += 1
            names.append(name)

        try:
            yield hold
        finally:
            for name in names:
                self.touch(name)
            with self._lock:
                self._held.subtract(names)
                self._held += Counter()

    def sweep(self) -> int:
        """Delete what no request needs that is not done: pictures at once, LoRAs as the room is needed, oldest first.

        Returns how many.
        """
        needed = self._in_use()
        found = (path for path in self._directory.iterdir() if is_server_file(path, _SERVER_FILE))
        idle = sorted((path for path in found if path.name not in needed), key=_used_at)
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
        """Unless it was used meanwhile, or shortly before."""
        with self._lock:
            if path.name in self._held or _used_at(path) >= self._clock() - GRACE_SECONDS:
                return False
            path.unlink(missing_ok=True)
            return True

    def _size(self, name: str) -> int:
        return size_of(self._directory, name)


def size_of(directory: Path, name: str) -> int:
    """Bytes of a file that was brought; 0 where there is none."""
    try:
        return (directory / name).stat().st_size
    except FileNotFoundError:
        return 0


def _used_at(path: Path) -> float:
    """When it was used last, in seconds since 1970; what is gone meanwhile was used long ago."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
