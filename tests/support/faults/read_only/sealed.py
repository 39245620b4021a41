"""test/sealed: while the file that the environment names is there, its server's database cannot be written to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.storage.database import Database
from tests.support.fake_models import GateEngine, NullModel

SEAL = Path(os.environ["SEAL"])
_held = Database._held


@contextmanager
def _sealed(self: Database) -> Iterator[None]:
    with _held(self):
        # What SQLite says then is what it says of a file on a read-only disk.
        self._connection.execute(f"PRAGMA query_only = {SEAL.exists():d}")
        yield


Database._held = _sealed  # type: ignore[method-assign]

MODEL = NullModel("test/sealed", GateEngine)
