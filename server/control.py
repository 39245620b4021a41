"""What the operator does beside serving: keys, webhooks, a backup; in the running server, or without one."""

import contextlib
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from server import auth
from server.auth import Scope
from server.database import FOLDERS, Database
from server.errors import DiskFails, DiskFull

#: What a backup holds beside the database and what waiting requests brought: pictures and uploads, the certificates.
_FOLDERS = ("files", "tls")
_WEBHOOKS = """
    SELECT deliveries.request_id, url, deliveries.attempt, due_at, delivered_at, deliveries.error
    FROM deliveries JOIN jobs USING (request_id) WHERE delivered_at IS NULL OR ?
    ORDER BY finished_at DESC LIMIT ?
"""


def _nothing() -> None:
    """Nobody has to be told."""


class Control:
    """Acts on one data folder. Every act takes and gives plain values, waits for the disk, and raises ValueError."""

    def __init__(
        self,
        database: Database,
        data_dir: Path,
        *,
        on_keys: Callable[[], None] = _nothing,
        on_webhooks: Callable[[], None] = _nothing,
        is_open: Callable[[], bool] | None = None,
    ) -> None:
        """`on_keys` and `on_webhooks` are called after a change of those; `is_open` tells of the running server."""
        self._database = database
        self._data_dir = data_dir
        self._on_keys = on_keys
        self._on_webhooks = on_webhooks
        self._is_open = is_open
        self.acts: dict[str, Callable[..., Any]] = {
            "add_key": self.add_key,
            "list_keys": self.list_keys,
            "is_open": self.is_open,
            "revoke_key": self.revoke_key,
            "list_webhooks": self.list_webhooks,
            "redeliver": self.redeliver,
            "back_up": self.back_up,
        }

    def add_key(self, name: str, scope: str) -> str:
        """A new key, which nobody can read again."""
        if not name or len(name) > 100 or not name.isprintable():
            raise ValueError("A key's name should have 1 to 100 letters")
        if scope not in set(Scope):
            raise ValueError(f"A key's scope should be one of {', '.join(Scope)}")
        key = auth.add(self._database, name, Scope(scope))
        self._on_keys()
        return key

    def list_keys(self) -> list[dict[str, Any]]:
        """Name, scope, time of making and owner of each."""
        return auth.listed(self._database)

    def is_open(self) -> bool:
        """Whether no key is asked for: by the running server, or by one on loopback without keys in its settings."""
        return self._is_open() if self._is_open else not auth.stored(self._database, with_first=False)

    def revoke_key(self, name: str) -> None:
        """From now on the key is a wrong one; its requests and pictures stay."""
        auth.revoke(self._database, name)
        self._on_keys()

    def list_webhooks(self, *, with_delivered: bool = False, limit: int = 100) -> list[dict[str, Any]]:
        """Those that wait to be sent or were given up, the newest first; `with_delivered` the others too."""
        return [dict(row) for row in self._database.read(_WEBHOOKS, with_delivered, limit)]

    def redeliver(self, request_id: str) -> None:
        """Send a webhook again, now, with all its retries: also one that was delivered or given up."""
        with self._database.transaction() as connection:
            changed = connection.execute(
                "UPDATE deliveries SET attempt = 0, due_at = ?, delivered_at = NULL, error = NULL WHERE request_id = ?",
                (time.time(), request_id),
            ).rowcount
        if not changed:
            raise ValueError(f"There is no webhook of request {request_id}")
        self._on_webhooks()

    def back_up(self, folder: str) -> int:
        """Copy the data folder into a new one while the server goes on; returns its bytes.

        What waiting requests brought goes with them, so it comes before the database; the rest of it, which came since,
        together with the database: meanwhile no request can end. Pictures are kept for longer, so they come last.
        """
        target = Path(folder)
        # Until it is whole it has another name.
        aside = Path(f"{target}.part")
        self._check(target, aside)
        try:
            aside.mkdir(parents=True, mode=0o700)
            try:
                self._copy("inputs", aside)
                self._database.copy(aside, together_with=partial(self._copy, "inputs", aside))
                for name in _FOLDERS:
                    self._copy(name, aside)
                aside.rename(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        except DiskFull as error:
            words = error.__cause__ if isinstance(error, DiskFails) else "No space left on device"
            raise ValueError(f"{target}: {words}") from None
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"{target}: {_brief(error)}") from None
        return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())

    def _copy(self, name: str, target: Path) -> None:
        """What is in a folder and not yet there."""
        if (self._data_dir / name).is_dir():
            shutil.copytree(self._data_dir / name, target / name, copy_function=_copy_if_new, dirs_exist_ok=True)

    def _check(self, target: Path, aside: Path) -> None:
        for name in {*_FOLDERS, *FOLDERS}:
            if target.resolve().is_relative_to((self._data_dir / name).resolve()):
                raise ValueError(f"{target} lies within what is backed up")
        for path in (target, aside):
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
