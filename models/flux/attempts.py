"""Attempts to compile that ended the process or lost the GPU, remembered across restarts."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.base import DeviceLost

log = logging.getLogger(__name__)

#: After this many deaths of the process in the middle of an attempt, the attempt is not made again. A single death may
#: only mean that an operator killed a slow start.
MAX_DEATHS = 2
#: The files of the attempts that run now, with the number of deaths before each.
_open: dict[Path, int] = {}


class Attempts:
    """A record of the attempts on one GPU with one set of library versions.

    While an attempt runs, a file counts it as a death of the process. The file is deleted when the attempt ends, so
    only an attempt that ended the process or lost the GPU leaves its file.
    """

    def __init__(self, directory: Path | None) -> None:
        """Keep the record in `directory`; keep no record if it is None."""
        self._directory = directory

    def is_refused(self, name: str) -> bool:
        """Return whether an attempt ended the process or lost the GPU too often to be made again."""
        path = self._path(name)
        return path is not None and _num_deaths(path) >= MAX_DEATHS

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record the block as an attempt. An attempt that raises DeviceLost is never made again."""
        path = self._path(name)
        if path is None:
            yield
            return
        _open[path] = _num_deaths(path)
        _write(path, _open[path] + 1)
        num_deaths = 0
        try:
            yield
        except DeviceLost:
            num_deaths = MAX_DEATHS
            raise
        finally:
            _write(path, num_deaths)
            _open.pop(path, None)

    def _path(self, name: str) -> Path | None:
        return self._directory and self._directory / name.replace(" ", "-")


def forget_open_attempts() -> None:
    """Do not count the attempts that run now as deaths: the process was asked to end."""
    for path, num_deaths in list(_open.items()):
        _write(path, num_deaths)


def _num_deaths(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return 0
    return int(text) if text.isdecimal() else 1


def _write(path: Path, num_deaths: int) -> None:
    """Write a number of deaths, or delete the file for 0. If the disk cannot be written, log a warning."""
    try:
        if num_deaths == 0:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="ascii") as file:
            file.write(str(num_deaths))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)
