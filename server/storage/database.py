"""The data folder's one SQLite file and the one connection to it."""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from server.errors import DiskFails, DiskFull
from server.storage.migrations import DataDirInUse, migrate

FILE = "queue.sqlite3"
#: What its rows list lies here, beside it. A start removes what no row lists.
FOLDERS = ("files", "uploads", "inputs")
#: What SQLite says when there is no more room: for a table, and for the index of its log.
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
#: When the disk is read-only, or broken; the rest of the code tells more of how.
_FAILING = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
#: And of a file that is none of its own, or is damaged.
_DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


class CorruptDatabase(RuntimeError):
    """The file cannot be read."""


class ReplacedDatabase(CorruptDatabase):
    """Another program put another file in its place, or wrote to it."""


class _FileIdentity:
    """Which file it is, and how large between two uses of it, so that a change that is not the server's is noticed.

    It is not opened for that: SQLite would lose its locks. Its time may change without it.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._log = file, file.with_name(f"{FILE}-wal")
        self.is_lost = False
        self._is, self._log_is = _identity(file), _identity(self._log)
        self.remember_size()

    def remember_size(self) -> None:
        """It should have this size the next time."""
        with suppress(FileNotFoundError):
            self._size = self._file.stat().st_size

    def check(self) -> None:
        """Raises ReplacedDatabase. The log is put aside then: SQLite would write what is in it into the new file."""
        if not self.is_lost and _identity(self._file) == self._is and self._file.stat().st_size == self._size:
            return
        if not self.is_lost and _identity(self._log) == self._log_is:
            self._log.rename(f"{self._log}.replaced")
        self.is_lost = True
        what = f"{self._file} was replaced or written to by another program while the server ran"
        raise ReplacedDatabase(f"{what}; stop the server before you restore it from a backup")


def _identity(file: Path) -> tuple[int, int] | None:
    """What it is to the system, whatever is in it; None where there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _translate_errors(file: Path) -> Iterator[None]:
    """Raises DiskFull and CorruptDatabase where SQLite says so in its own words."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        # Python's own errors have none.
        code = getattr(error, "sqlite_errorcode", 0)
        if code in _FULL:
            raise DiskFull from error
        if code & 0xFF in _FAILING:
            raise DiskFails(f"{DiskFails.message}: {error}") from error
        if code & 0xFF in _DAMAGED:
            raise CorruptDatabase(f"{file} is not a database of this server; restore it from a backup") from error
        raise


def check_data_dir(directory: Path) -> None:
    """Leave a folder alone where files are and no database tells of them: all would be strays. Raises OSError."""
    if (directory / FILE).is_file() and (directory / FILE).stat().st_size:
        return
    for name in FOLDERS:
        # Of a file system of its own, which has this from the beginning.
        if (directory / name).is_dir() and any(path.name != "lost+found" for path in (directory / name).iterdir()):
            what = f"{directory} has {name}/ but no {FILE}"
            raise OSError(f"{what}: it is not a data folder of this server, or its database is missing")


def read_only_query(directory: Path, sql: str) -> list[sqlite3.Row]:
    """Rows of one query, read beside whoever has the folder. Raises sqlite3.Error, also where there is no database."""
    file = (directory / FILE).absolute()
    # Without a log nobody has it open, and SQLite would make one, which might then be another user's.
    mode = "ro" if file.with_name(f"{FILE}-wal").exists() else "ro&immutable=1"
    with closing(sqlite3.connect(f"{file.as_uri()}?mode={mode}", uri=True)) as connection:
        return connection.execute(sql).fetchall()


class Database:
    """SQLite in WAL mode with every commit on disk before it is answered.

    One process owns the file and one connection does all the work: two that write or checkpoint at once can
    corrupt a WAL database before SQLite 3.51.3 (sqlite.org/wal.html, "the WAL-reset bug").
    """

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise OSError(f"--data-dir {directory} cannot be made: {error.strerror}") from None
        check_data_dir(directory)
        # Prompts and keys are nobody else's business, also in a folder that was there before.
        # SQLite gives its other files the mode of this one.
        (directory / FILE).touch(mode=0o600)
        (directory / FILE).chmod(0o600)
        # Nobody else's to open either: who locks it keeps the server from starting.
        self._lock_file = os.fdopen(os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600), "w")
        os.fchmod(self._lock_file.fileno(), 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise DataDirInUse(f"another server is using {directory}; give this one its own --data-dir") from None
        self._file = directory / FILE
        self._connection = sqlite3.connect(self._file, check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        # A text that is none, in a damaged row, must not keep all others from being read.
        self._connection.text_factory = partial(str, encoding="utf-8", errors="replace")
        self._lock = threading.Lock()
        self._place: _FileIdentity | None = None
        #: Told when the file turns out to be damaged: whoever has it open cannot go on.
        self.on_corruption: Callable[[CorruptDatabase], None] = lambda error: None
        try:
            with _translate_errors(self._file):
                for pragma in ("journal_mode=WAL", "synchronous=FULL", "mmap_size=0", "foreign_keys=ON"):
                    self._connection.execute(f"PRAGMA {pragma}")
                migrate(self._connection)
            self._place = _FileIdentity(self._file)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The connection, for one thread at a time. Raises DiskFull, DiskFails and CorruptDatabase."""
        place = self._place
        assert place
        try:
            with self._lock, _translate_errors(self._file):
                place.check()
                try:
                    yield
                finally:
                    place.remember_size()
        except CorruptDatabase as error:
            self.on_corruption(error)
            raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on disk when it ends. Raises DiskFull, with nothing changed."""
        with self._held():
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def read(self, sql: str, *parameters: object) -> list[sqlite3.Row]:
        """Rows of one query."""
        with self._held():
            return self._connection.execute(sql, parameters).fetchall()

    def backup_to(self, directory: Path, extra_copy: Callable[[], None]) -> None:
        """Write all of it, as it is now, into a new file in this folder, and do this, while nothing can change.

        Raises DiskFull.
        """
        with self._held():
            self._connection.execute("VACUUM INTO ?", (str(directory / FILE),))
            extra_copy()
        (directory / FILE).chmod(0o600)

    def close(self) -> None:
        """Close the file and let others have the folder."""
        with self._lock:
            # Closed, SQLite would write its log into a file that is another's by now.
            if not (self._place and self._place.is_lost):
                self._connection.close()
        self._lock_file.close()
