"""test/sealed: makes the server's database read-only while the file named by $SEAL exists."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.storage.database import Database
from tests.support.fake_models import GateEngine, NullModel

SEAL = Path(os.environ["SEAL"])
_original_held = Database._held


@contextmanager
def _held_sealed(self: Database) -> Iterator[None]:
    with _original_held(self):
        # SQLite then raises the same error as for a file on a read-only disk.
        self._connection.execute(f"PRAGMA query_only = {SEAL.exists():d}")
        yield


Database._held = _held_sealed  # type: ignore[method-assign]

MODEL = NullModel("test/sealed", GateEngine)
