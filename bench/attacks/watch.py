"""What the server takes meanwhile: resident memory, and bytes in its data folder."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from server.storage.database import FILE, FOLDERS

#: How often memory and folder are looked at, in seconds.
EVERY = 0.1
_FOLDER_EVERY = 0.5
#: The share of a core below which a server counts as at rest, how many of the other key's operations may be waiting
#: then, and how long that is waited for, in seconds.
AT_REST, FEW, LONGEST_REST = 0.4, 3, 10.0
#: An attack is ended when the machine has less memory left than this.
LEAST_FREE = 10**9


class Watch:
    """Looks at a server whenever it is told to, and remembers the highest figures."""

    def __init__(self, pid: int, data_dir: Path) -> None:
        self._server = psutil.Process(pid)
        self._data_dir = data_dir
        self.memory = self.highest_memory = 0
        self.folder: dict[str, int] = {}
        self.highest_folder: dict[str, int] = {}
        self._folder_at = 0.0
        self._children: list[psutil.Process] = []
        self.look()

    def look(self) -> None:
        """Take the figures of now."""
        if time.monotonic() - self._folder_at >= _FOLDER_EVERY:
            self.look_at_folder()
            with suppress(psutil.NoSuchProcess):
                self._children = self._server.children(recursive=True)
        self.memory = sum(_resident(process) for process in (self._server, *self._children))
        self.highest_memory = max(self.highest_memory, self.memory)

    def look_at_folder(self) -> None:
        """Count its bytes now."""
        self._folder_at = time.monotonic()
        self.folder = folder_bytes(self._data_dir)
        for name, number in self.folder.items():
            self.highest_folder[name] = max(number, self.highest_folder.get(name, 0))

    def for_seconds(self, seconds: float) -> None:
        """Look again and again for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.look()
            time.sleep(EVERY)

    def until_calm(self, waiting: Callable[[], int]) -> float | None:
        """Wait until the server is at rest, and of the other key's operations only a few are waiting.

        Returns the seconds until then, or None when it is not so after the longest.
        """
        begun = time.monotonic()
        while time.monotonic() - begun < LONGEST_REST:
            before, at, most = self._cpu_seconds(), time.monotonic(), waiting()
            while time.monotonic() < at + _FOLDER_EVERY:
                self.for_seconds(EVERY)
                most = max(most, waiting())
            if most <= FEW and self._cpu_seconds() - before < AT_REST * (time.monotonic() - at):
                return at - begun
        return None

    def until_swept(self, every: float) -> None:
        """Wait for two sweeps, and on while the folder still changes, but not for ever."""
        until = time.monotonic() + LONGEST_REST
        self.for_seconds(2 * every)
        is_changing = True
        while is_changing and time.monotonic() < until:
            self.look_at_folder()
            before = self.folder
            self.for_seconds(1.2 * every)
            self.look_at_folder()
            is_changing = before != self.folder

    def _cpu_seconds(self) -> float:
        with suppress(psutil.NoSuchProcess):
            times = self._server.cpu_times()
            return float(times.user + times.system)
        return 0.0


def is_machine_full() -> bool:
    """Whether an attack should be ended for the machine's sake."""
    return bool(psutil.virtual_memory().available < LEAST_FREE)


def folder_bytes(data_dir: Path) -> dict[str, int]:
    """Bytes of the database, of its log, of each folder of the server's files, and in all; and how many files."""
    found = {"database": _size(data_dir / FILE), "wal": _size(data_dir / f"{FILE}-wal")}
    num_files = 0
    for name in FOLDERS:
        sizes = list(_sizes(data_dir / name))
        found[name] = sum(sizes)
        num_files += len(sizes)
    return {**found, "total": sum(found.values()), "num_files": num_files}


def _sizes(folder: Path) -> Iterator[int]:
    # What is deleted meanwhile is not there.
    with suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                yield from _sizes(Path(entry.path))
            else:
                with suppress(FileNotFoundError):
                    yield entry.stat(follow_symlinks=False).st_size


def _size(file: Path) -> int:
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess):
        return int(process.memory_info().rss)
    return 0
