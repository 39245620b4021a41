"""A file system of a few MiB, to be filled: a tmpfs in a namespace of its own, for which nobody needs to be root."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.server_process import ROOT

#: The shell that mounts it lives as long as its standard input is open, and the disk as long as the shell.
_HOLD = 'mount -t tmpfs -o size=$1,nr_inodes=$2 none "$0" && echo ready && exec cat'
_MAX_FILES = 500
_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")


class SmallDisk:
    """Where a server can be started `within`; `folder` is what it calls the disk, `seen` where it is seen from here."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder = folder
        enter = ("nsenter", f"--target={pid}", "--user", "--mount", "--preserve-credentials")
        # Which enters at the root.
        self.within = (*enter, "env", f"--chdir={ROOT}")
        self.seen = Path(f"/proc/{pid}/root") / folder.relative_to("/")
        self._filler = self.seen / "filler"
        self._filler.mkdir()

    def fill(self, room: int = 0) -> None:
        """Take all but so many bytes, rounded down to whole pages."""
        with (self._filler / "large").open("wb") as file:
            free = os.statvfs(self.seen)
            os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - room))

    def fill_names(self) -> None:
        """Leave room for bytes, but not for one more file."""
        # Until it says so: others make files too.
        with suppress(OSError):
            for number in range(_MAX_FILES):
                (self._filler / str(number)).touch()

    def free(self) -> None:
        """Give it all back."""
        for path in self._filler.iterdir():
            path.unlink()

    def copy(self, name: str, to: Path) -> Path:
        """A folder of it, on an ordinary disk."""
        return Path(shutil.copytree(self.seen / name, to))


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[SmallDisk]:
    """An empty disk of so many bytes for as long as the block lasts; skips where the system lets nobody mount one."""
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("no file system can be mounted here: util-linux has the commands")
    folder.mkdir()
    with subprocess.Popen(
        [*_NAMESPACE, _HOLD, str(folder), str(size), str(_MAX_FILES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin and holder.stdout and holder.stderr
        if holder.stdout.readline() != "ready\n":
            pytest.skip(f"no file system can be mounted here: {holder.stderr.read().strip()}")
        yield SmallDisk(folder, holder.pid)
