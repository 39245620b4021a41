"""Attempts to compile that ended the process or lost the GPU, remembered across restarts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

#: After this many deaths of the process in the middle of an attempt, it is not made again. One death may be an operator
#: who ended a slow start.
MAX_DEATHS = 2


class Attempts:
    """A record of attempts in the directory of compiled code, so that it holds for one GPU and its library versions.

    During an attempt, a file of its name counts the deaths of processes, this one included; its end deletes the file.
    """

    def __init__(self, directory: Path | None) -> None:
        """Keep the record in `directory`, or keep none."""
        self._directory = directory and directory / "attempts"

    def is_refused(self, name: str) -> bool:
        """Return whether an attempt ended the process or lost the GPU too often to be made again."""
        return self._num_deaths(name) >= MAX_DEATHS

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record the block as an attempt. If it loses the GPU, it is never made again."""
        self._write(name, self._num_deaths(name) + 1)
        try:
            yield
        except torch.AcceleratorError:
            self._write(name, MAX_DEATHS)
            raise
        except BaseException:
            self._delete(name)
            raise
        else:
            self._delete(name)

    def _path(self, name: str) -> Path | None:
        return self._directory and self._directory / name.replace(" ", "-")

    def _num_deaths(self, name: str) -> int:
        path = self._path(name)
        if path is None or not path.is_file():
            return 0
        text = path.read_text(encoding="ascii", errors="replace").strip()
        return int(text) if text.isdecimal() else 1

    def _write(self, name: str, num_deaths: int) -> None:
        if path := self._path(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="ascii") as file:
                file.write(str(num_deaths))
                file.flush()
                os.fsync(file.fileno())

    def _delete(self, name: str) -> None:
        if path := self._path(name):
            path.unlink(missing_ok=True)
