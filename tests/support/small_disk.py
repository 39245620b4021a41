"""A file system of a few MiB that tests can fill: a tmpfs in a separate namespace, which needs no root."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.server_process import ROOT

#: The shell that mounts the disk runs until its standard input is closed; the disk exists as long as the shell.
_HOLD = 'mount -t tmpfs -o size=$1,nr_inodes=$2 none "$0" && echo ready && exec cat'
_MAX_FILES = 500
_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")


class SmallDisk:
    """A small disk in a namespace. A command with the prefix `enter_command` runs in this namespace.

    `inner_path` is the path of the disk inside the namespace, `outer_path` its path outside.
    """

    def __init__(self, directory: Path, pid: int) -> None:
        self.inner_path = directory
        enter = ("nsenter", f"--target={pid}", "--user", "--mount", "--preserve-credentials")
        # nsenter starts at the root directory.
        self.enter_command = (*enter, "env", f"--chdir={ROOT}")
        self.outer_path = Path(f"/proc/{pid}/root") / directory.relative_to("/")
        self._filler = self.outer_path / "filler"
        self._filler.mkdir()

    def fill(self, room: int = 0) -> None:
        """Fill the disk except for `room` bytes, rounded down to whole pages."""
        with (self._filler / "large").open("wb") as file:
            while True:
                free = os.statvfs(self.outer_path)
                try:
                    os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - room))
                    return
                except OSError as error:
                    # The server has written in the meantime, so try again with the room that is left.
                    if error.errno != errno.ENOSPC:
                        raise

    def fill_inodes(self) -> None:
        """Use up all inodes, so that bytes can be written but no further file can be created."""
        # Stop at the first error. The server creates files too, so the error may come before _MAX_FILES.
        with suppress(OSError):
            for number in range(_MAX_FILES):
                (self._filler / str(number)).touch()

    def free(self) -> None:
        """Free all space and inodes that `fill` and `fill_inodes` took."""
        for path in self._filler.iterdir():
            path.unlink()

    def copy(self, name: str, to: Path) -> Path:
        """Copy a directory of this disk to an ordinary disk; return the copy's path."""
        return Path(shutil.copytree(self.outer_path / name, to))


@contextmanager
def small_disk(directory: Path, size: int) -> Iterator[SmallDisk]:
    """Mount an empty disk of `size` bytes until the block ends; skip the test if the system does not allow it."""
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("cannot mount a file system: install util-linux, which has unshare and nsenter")
    directory.mkdir()
    with subprocess.Popen(
        [*_NAMESPACE, _HOLD, str(directory), str(size), str(_MAX_FILES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin and holder.stdout and holder.stderr
        if holder.stdout.readline() != "ready\n":
            pytest.skip(f"cannot mount a file system: {holder.stderr.read().strip()}")
        yield SmallDisk(directory, holder.pid)
