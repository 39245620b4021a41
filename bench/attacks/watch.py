"""The resources of the server during an attack: resident memory, and bytes in the data directory."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from server.storage.database import DIRECTORIES, FILE

#: Seconds between two readings of the memory, and between two of the data directory.
EVERY = 0.1
_DIRECTORY_EVERY = 0.5
#: A server is at rest if it uses less than this share of a core while at most FEW of the other key's operations wait.
#: LONGEST_REST is the longest wait for a rest, in seconds.
AT_REST, FEW, LONGEST_REST = 0.4, 3, 10.0
#: An attack ends when fewer bytes of the machine's memory than this are available.
LEAST_FREE = 10**9


class Watch:
    """Readings of a server's memory and data directory, taken on demand, with their maxima."""

    def __init__(self, pid: int, data_dir: Path) -> None:
        self._server = psutil.Process(pid)
        self._data_dir = data_dir
        self.memory = self.highest_memory = 0
        self.directory_bytes: dict[str, int] = {}
        self.highest_directory_bytes: dict[str, int] = {}
        self._directory_at = 0.0
        self._children: list[psutil.Process] = []
        self.look()

    def look(self) -> None:
        """Read the memory, and the data directory if its last reading is old."""
        if time.monotonic() - self._directory_at >= _DIRECTORY_EVERY:
            self.look_at_directory()
            with suppress(psutil.NoSuchProcess):
                self._children = self._server.children(recursive=True)
        self.memory = sum(_resident(process) for process in (self._server, *self._children))
        self.highest_memory = max(self.highest_memory, self.memory)

    def look_at_directory(self) -> None:
        """Count the bytes in the data directory."""
        self._directory_at = time.monotonic()
        self.directory_bytes = directory_bytes(self._data_dir)
        for name, number in self.directory_bytes.items():
            self.highest_directory_bytes[name] = max(number, self.highest_directory_bytes.get(name, 0))

    def for_seconds(self, seconds: float) -> None:
        """Take readings for `seconds`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.look()
            time.sleep(EVERY)

    def until_calm(self, waiting: Callable[[], int]) -> float | None:
        """Wait until the server is at rest and only a few of the other key's operations are waiting.

        Return the seconds until then, or None if that takes longer than LONGEST_REST.
        """
        start = time.monotonic()
        while time.monotonic() - start < LONGEST_REST:
            before, interval_start, most_waiting = self._cpu_seconds(), time.monotonic(), waiting()
            while time.monotonic() < interval_start + _DIRECTORY_EVERY:
                self.for_seconds(EVERY)
                most_waiting = max(most_waiting, waiting())
            if most_waiting <= FEW and self._cpu_seconds() - before < AT_REST * (time.monotonic() - interval_start):
                return interval_start - start
        return None

    def until_swept(self, every: float) -> None:
        """Wait for two sweeps, then until the data directory stops changing; LONGEST_REST seconds at most, roughly."""
        until = time.monotonic() + LONGEST_REST
        self.for_seconds(2 * every)
        is_changing = True
        while is_changing and time.monotonic() < until:
            self.look_at_directory()
            before = self.directory_bytes
            self.for_seconds(1.2 * every)
            self.look_at_directory()
            is_changing = before != self.directory_bytes

    def _cpu_seconds(self) -> float:
        with suppress(psutil.NoSuchProcess):
            times = self._server.cpu_times()
            return float(times.user + times.system)
        return 0.0


def is_machine_full() -> bool:
    """Return whether the machine is short of memory, so that an attack should end."""
    return bool(psutil.virtual_memory().available < LEAST_FREE)


def directory_bytes(data_dir: Path) -> dict[str, int]:
    """Return the bytes of the database, its WAL, each directory of files and all together, and the number of files."""
    sizes = {"database": _size(data_dir / FILE), "wal": _size(data_dir / f"{FILE}-wal")}
    num_files = 0
    for name in DIRECTORIES:
        file_sizes = list(_sizes(data_dir / name))
        sizes[name] = sum(file_sizes)
        num_files += len(file_sizes)
    return {**sizes, "total": sum(sizes.values()), "num_files": num_files}


def _sizes(directory: Path) -> Iterator[int]:
    # Files and directories may be deleted during the scan.
    with suppress(FileNotFoundError):
        for entry in os.scandir(directory):
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
