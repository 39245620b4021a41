import sqlite3
from pathlib import Path

import pytest

from server.storage.database import CorruptDatabase, Database


def test_a_closed_database_does_not_count_as_replaced(tmp_path: Path) -> None:
    """A thread may come late when the server stops. Closing has changed the file's size, but nobody replaced it."""
    database, errors = Database(tmp_path), list[CorruptDatabase]()
    database.on_corruption = errors.append
    with database.transaction() as transaction:
        transaction.execute("CREATE TABLE large (content)")
        transaction.execute("INSERT INTO large VALUES (zeroblob(100000))")
    database.close()
    with pytest.raises(sqlite3.ProgrammingError, match="the database is closed"):
        database.read("SELECT 1")
    assert errors == []
