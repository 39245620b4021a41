"""A copy of the data directory, made while the server goes on."""

import contextlib
import re
import shutil
import sqlite3
from functools import partial
from pathlib import Path

from server.errors import DiskFails, DiskFull
from server.storage.database import FOLDERS, Database

#: What a backup holds beside the database and the inputs of waiting requests: images and uploads, the certificates.
_FOLDERS = ("files", "tls")


def back_up(database: Database, data_dir: Path, target: Path) -> int:
    """Copy the data folder into a new one while the server goes on; returns its bytes.

    What waiting requests brought goes with them, so it comes before the database; the rest of it, which came since,
    together with the database: meanwhile no request can end. Pictures are kept for longer, so they come last.

    Raises ValueError, naming the target and why it cannot be written.
    """
    # Until it is whole it has another name.
    temp_path = Path(f"{target}.part")
    _check(data_dir, target, temp_path)
    try:
        temp_path.mkdir(parents=True, mode=0o700)
        try:
            _copy(data_dir, "inputs", temp_path)
            database.backup_to(temp_path, extra_copy=partial(_copy, data_dir, "inputs", temp_path))
            for name in _FOLDERS:
                _copy(data_dir, name, temp_path)
            temp_path.rename(target)
        finally:
            shutil.rmtree(temp_path, ignore_errors=True)
    except DiskFull as error:
        message = error.__cause__ if isinstance(error, DiskFails) else "No space left on device"
        raise ValueError(f"{target}: {message}") from None
    except (OSError, sqlite3.Error) as error:
        raise ValueError(f"{target}: {_brief(error)}") from None
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _copy(data_dir: Path, name: str, target: Path) -> None:
    """What is in a folder and not yet there."""
    if (data_dir / name).is_dir():
        shutil.copytree(data_dir / name, target / name, copy_function=_copy_if_new, dirs_exist_ok=True)


def _check(data_dir: Path, target: Path, temp_path: Path) -> None:
    for name in {*_FOLDERS, *FOLDERS}:
        if target.resolve().is_relative_to((data_dir / name).resolve()):
            raise ValueError(f"{target} lies within what is backed up")
    for path in (target, temp_path):
        if path.exists():
            raise ValueError(f"{path}: File exists")


def _brief(error: Exception) -> str:
    """What the system says; of several files what it says of the first, and how many they are."""
    if not isinstance(error, shutil.Error):
        return getattr(error, "strerror", None) or str(error)
    reasons = [str(reason) for _, _, reason in error.args[0]]
    first = re.sub(r"^\[Errno \d+\] |: ['\"].*$", "", reasons[0])
    return f"{first} ({len(reasons)} file{'s' if len(reasons) > 1 else ''})"


def _copy_if_new(source: str, target: str) -> str:
    """One file; what expired meanwhile is left out."""
    with contextlib.suppress(FileNotFoundError):
        if not Path(target).exists():
            shutil.copy2(source, target)
    return target
