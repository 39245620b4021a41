"""A copy of the data directory, made while the server runs."""

import contextlib
import re
import shutil
import sqlite3
from functools import partial
from pathlib import Path

from server.errors import DiskFails, DiskFull
from server.storage.database import DIRECTORIES, Database

#: Directories copied in addition to the database and the inputs: images and uploads, and certificates.
_DIRECTORIES = ("files", "tls")


def back_up(database: Database, data_dir: Path, target: Path) -> int:
    """Copy the data directory into a new one while the server runs; return the size of the copy in bytes.

    Input files may be deleted soon after their request ends, so they are copied before the database. Input files that
    arrive meanwhile are copied while the database is locked, when no request can end. Images are kept longer, so they
    are copied last. Parts of unfinished uploads are not copied.

    Raises ValueError, naming the target and the reason, and CorruptDatabase.
    """
    # An incomplete backup has another name, so that it is not restored by mistake.
    temp_path = Path(f"{target}.part")
    _check(data_dir, target, temp_path)
    try:
        temp_path.mkdir(parents=True, mode=0o700)
        try:
            _copy(data_dir, "inputs", temp_path)
            database.backup_to(temp_path, extra_copy=partial(_copy, data_dir, "inputs", temp_path))
            for name in _DIRECTORIES:
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
    """Copy the directory `name` into the target, except files that the target already has."""
    if (data_dir / name).is_dir():
        shutil.copytree(data_dir / name, target / name, copy_function=_copy_if_new, dirs_exist_ok=True)


def _check(data_dir: Path, target: Path, temp_path: Path) -> None:
    for name in {*_DIRECTORIES, *DIRECTORIES}:
        if target.resolve().is_relative_to((data_dir / name).resolve()):
            raise ValueError(f"{target} is inside a directory that is backed up; choose another target")
    for path in (target, temp_path):
        if path.exists():
            raise ValueError(f"{path} already exists; choose another target")


def _brief(error: Exception) -> str:
    """Return the system's message; if files could not be copied, the first file's message and the number of files."""
    if not isinstance(error, shutil.Error):
        return getattr(error, "strerror", None) or str(error)
    reasons = [str(reason) for _, _, reason in error.args[0]]
    first = re.sub(r"^\[Errno \d+\] |: ['\"].*$", "", reasons[0])
    return f"{first} ({len(reasons)} file{'s' if len(reasons) > 1 else ''})"


def _copy_if_new(source: str, target: str) -> str:
    """Copy one file, unless the target exists or the source was deleted meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        if not Path(target).exists():
            shutil.copy2(source, target)
    return target
