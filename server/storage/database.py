"""The SQLite file of the data directory, and the server's only connection to it."""

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
#: Directories next to the database, for the files that its rows list. The server deletes files that no row lists.
DIRECTORIES = ("files", "uploads", "inputs")
#: SQLite's codes for a full disk: while it writes the database, and while it writes the index of the write-ahead log.
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
#: SQLite's codes for a read-only or broken disk. They are the low byte of the error code.
_FAILING = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
#: SQLite's codes for a file that is not a database, or is damaged. They are the low byte of the error code.
_DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


class CorruptDatabase(RuntimeError):
    """An unreadable database file."""


class ReplacedDatabase(CorruptDatabase):
    """A database file that another program replaced or wrote to."""


class _FileIdentity:
    """The identity and last known size of the database file, which show when another program has changed the file.

    The file is not opened for these checks, because closing it would release SQLite's locks. The modification time is
    not compared, because it can change although the content does not.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._log = file, file.with_name(f"{FILE}-wal")
        self.is_lost = False
        self._file_id, self._log_id = _id(_stat(file)), _id(_stat(self._log))
        self.remember_size()

    def remember_size(self) -> None:
        """Record the size that the next check expects."""
        with suppress(FileNotFoundError):
            self._size = self._file.stat().st_size

    def check(self) -> None:
        """Raise ReplacedDatabase if another program replaced the file or changed its size.

        The write-ahead log of a replaced file is renamed, because SQLite would copy the log into the new file.
        """
        # One look for identity and size: the file can vanish at any time.
        now = _stat(self._file)
        if not self.is_lost and now and _id(now) == self._file_id and now.st_size == self._size:
            return
        if not self.is_lost and _id(_stat(self._log)) == self._log_id:
            self._log.rename(f"{self._log}.replaced")
        self.is_lost = True
        problem = f"{self._file} was replaced or written to by another program while the server ran"
        raise ReplacedDatabase(f"{problem}; stop the server before you restore it from a backup")


def _stat(file: Path) -> os.stat_result | None:
    """Return what the system knows of a file, or None if there is no file."""
    with suppress(FileNotFoundError):
        return file.stat()
    return None


def _id(stat: os.stat_result | None) -> tuple[int, int] | None:
    """Return a file's device and inode; None for no file."""
    return (stat.st_dev, stat.st_ino) if stat else None


@contextmanager
def _translate_errors(file: Path) -> Iterator[None]:
    """Translate SQLite's errors. Raises DiskFull, DiskFails and CorruptDatabase."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        # Only errors from SQLite have a code; those from Python's sqlite3 module itself have none.
        code = getattr(error, "sqlite_errorcode", 0)
        if code in _FULL:
            raise DiskFull from error
        if code & 0xFF in _FAILING:
            raise DiskFails.because(error) from error
        if code & 0xFF in _DAMAGED:
            raise CorruptDatabase(f"{file} is damaged or is not a database; restore it from a backup") from error
        raise


def check_data_dir(directory: Path) -> None:
    """Raise OSError for a directory with files but no database: the server would delete the files as orphans."""
    if (directory / FILE).is_file() and (directory / FILE).stat().st_size:
        return
    for name in DIRECTORIES:
        # A new file system that is mounted here contains lost+found.
        if (directory / name).is_dir() and any(path.name != "lost+found" for path in (directory / name).iterdir()):
            raise OSError(
                f"{directory} has {name}/ but no {FILE}: it is not a data directory of this server, or its database is"
                " missing; restore it from a backup, or choose another --data-dir"
            )


def read_only_query(directory: Path, sql: str) -> list[sqlite3.Row]:
    """Return the rows of one query, even while a server runs. Raises sqlite3.Error, also for a missing database."""
    file = (directory / FILE).absolute()
    # Without a write-ahead log, no process has the database open. Then `immutable` keeps SQLite from creating a log,
    # which might belong to the wrong user.
    mode = "ro" if file.with_name(f"{FILE}-wal").exists() else "ro&immutable=1"
    with closing(sqlite3.connect(f"{file.as_uri()}?mode={mode}", uri=True)) as connection:
        return connection.execute(sql).fetchall()


class Database:
    """An SQLite database in WAL mode. Every commit is on the disk before its caller continues.

    One process owns the file and one connection does all the work: before SQLite 3.51.3, two connections that write or
    checkpoint at once can corrupt a WAL database (sqlite.org/wal.html, "the WAL-reset bug").
    """

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise OSError(f"--data-dir {directory} cannot be created: {error.strerror}") from None
        check_data_dir(directory)
        # Prompts and key hashes are private, even if the directory existed before and others may read it.
        # SQLite gives its other files the mode of this one.
        (directory / FILE).touch(mode=0o600)
        (directory / FILE).chmod(0o600)
        # The lock file is private too: any user who can open it could lock it, and the server would not start.
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
        # Invalid text in a damaged row must not keep the other rows from being read.
        self._connection.text_factory = partial(str, encoding="utf-8", errors="replace")
        self._lock = threading.Lock()
        self._is_closed = False
        self._identity: _FileIdentity | None = None
        #: Called when the database file is found to be damaged or replaced: the server must stop then.
        self.on_corruption: Callable[[CorruptDatabase], None] = lambda error: None
        try:
            with _translate_errors(self._file):
                for pragma in ("journal_mode=WAL", "synchronous=FULL", "mmap_size=0", "foreign_keys=ON"):
                    self._connection.execute(f"PRAGMA {pragma}")
                migrate(self._connection)
            self._identity = _FileIdentity(self._file)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Lock the connection for this thread. Raises DiskFull, DiskFails, CorruptDatabase and ReplacedDatabase.

        Raises sqlite3.ProgrammingError after `close`, for threads that a stopping server no longer waits for.
        """
        identity = self._identity
        assert identity
        try:
            with self._lock, _translate_errors(self._file):
                # Check this first, because closing has changed the file's size: SQLite has copied its log into it.
                if self._is_closed:
                    raise sqlite3.ProgrammingError("the database is closed")
                identity.check()
                try:
                    yield
                finally:
                    identity.remember_size()
        except CorruptDatabase as error:
            self.on_corruption(error)
            raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run a transaction: all or nothing, and on disk when the block ends.

        Raises DiskFull, DiskFails, CorruptDatabase and ReplacedDatabase, and sqlite3.ProgrammingError after `close`;
        nothing is changed then.
        """
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
        """Return the rows of one query. Raises as `transaction` does."""
        with self._held():
            return self._connection.execute(sql, parameters).fetchall()

    def backup_to(self, directory: Path, extra_copy: Callable[[], None]) -> None:
        """Copy the database into a new file in `directory`, then call `extra_copy`. The database is locked throughout.

        Raises DiskFull, DiskFails, CorruptDatabase, ReplacedDatabase and the errors of `extra_copy`.
        """
        with self._held():
            self._connection.execute("VACUUM INTO ?", (str(directory / FILE),))
            extra_copy()
        (directory / FILE).chmod(0o600)

    def close(self) -> None:
        """Close the database and unlock the data directory for other processes."""
        with self._lock:
            self._is_closed = True
            # If the file was replaced, closing would make SQLite copy its write-ahead log into the new file.
            if not (self._identity and self._identity.is_lost):
                self._connection.close()
        self._lock_file.close()
