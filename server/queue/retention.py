"""Deletion of old results and files: by age, by expiry, and to save disk space."""

import logging
import math
import time
from collections.abc import Callable, Collection

from server.errors import StillInProgress
from server.queue.jobs import Job, State
from server.queue.queue import Queue
from server.storage.database import Database
from server.storage.file_store import FileStore

log = logging.getLogger(__name__)

#: Seconds for which a result with `store_io` False stays after its first fetch, because clients retry a broken fetch.
GRACE_SECONDS = 600.0
#: How many jobs are deleted in one transaction.
_BATCH = 500
#: Results whose webhook is still due are kept, because the webhook sends them. Such a result can seem old: when a slow
#: clock is corrected, every result becomes older at once.
_WEBHOOK_DONE = """NOT EXISTS (
    SELECT 1 FROM deliveries WHERE deliveries.request_id = results.request_id AND due_at IS NOT NULL
)"""
_EXPIRED = f"""
    SELECT request_id FROM jobs AS results
    WHERE state = 'COMPLETED' AND ((is_kept = 0 AND fetched_at <= ?) OR finished_at <= ?) AND {_WEBHOOK_DONE}
"""  # noqa: S608  no client input in the SQL
#: All files and rows of an owner with their bytes, as the table `kept` counts them.
_STORED_BYTES = """
    SELECT name, request_id, max(size, 4096) AS size, created_at FROM files WHERE owner = ?1
    UNION ALL
    SELECT NULL, request_id, num_bytes, finished_at FROM row_sizes WHERE owner = ?1
"""


class Retention:
    """The retention policy. It deletes rows before files, so that no row lists a missing file."""

    def __init__(
        self,
        database: Database,
        queue: Queue,
        files: FileStore,
        *,
        max_age: float,
        max_bytes: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._queue = queue
        self._files = files
        self._max_age = max_age
        self._max_bytes = max_bytes
        self._clock = clock

    def sweep(self) -> int:
        """Delete what is expired, too old or over the disk limit; return how many jobs were deleted."""
        now = self._clock()
        self._expire_files(now)
        old = self._database.read(
            "SELECT name FROM files WHERE request_id IS NULL AND created_at <= ?", now - self._max_age
        )
        self._delete_uploads([row["name"] for row in old])
        rows = self._database.read(_EXPIRED, now - GRACE_SECONDS, now - self._max_age)
        num_expired = self._delete([row["request_id"] for row in rows])
        if num_expired or old:
            log.info("deleted %d results and %d uploads that had expired", num_expired, len(old))
        return num_expired + self._fit_budget()

    def delete(self, job: Job) -> None:
        """Delete one finished job and its images now. Raises StillInProgress for an unfinished job."""
        if job.state != State.COMPLETED:
            raise StillInProgress("Request is still in progress; cancel it first")
        self._delete([job.request_id])

    def _expire_files(self, now: float) -> None:
        with self._database.transaction() as connection:
            rows = connection.execute("DELETE FROM files WHERE expires_at <= ? RETURNING name", (now,)).fetchall()
        self._files.delete([row["name"] for row in rows])

    def _fit_budget(self) -> int:
        """Delete the oldest data of the owners that exceed their share, until all data fits the disk limit.

        Shares are equal; space that an owner does not use goes to the others. Returns how many jobs were deleted.
        """
        sizes = {row["owner"]: row["num_bytes"] for row in self._database.read("SELECT owner, num_bytes FROM kept")}
        share = _share(sizes.values(), self._max_bytes)
        return sum(self._shrink(owner, size - share) for owner, size in sizes.items() if size > share)

    def _shrink(self, owner: str, excess: float) -> int:
        """Delete an owner's oldest results and uploads, `excess` bytes or more; return how many jobs were deleted.

        Results with a due webhook stay.
        """
        # A dict serves as a set with an order, because the rows of two requests can be mixed.
        request_ids: dict[str, None] = {}
        uploads: list[str] = []
        rows = self._database.read(
            f"SELECT * FROM ({_STORED_BYTES}) AS results WHERE {_WEBHOOK_DONE} ORDER BY created_at, request_id",  # noqa: S608
            owner,
        )
        for row in rows:
            if excess <= 0 and row["request_id"] not in request_ids:
                break
            excess -= row["size"]
            if row["request_id"] is None:
                uploads.append(row["name"])
            else:
                request_ids[row["request_id"]] = None
        self._delete_uploads(uploads)
        num_results = self._delete(list(request_ids))
        if num_results or uploads:
            message = "deleted the oldest %d results and %d uploads of owner %s, to stay within --retention-gb"
            log.info(message, num_results, len(uploads), owner)
        return num_results

    def _delete_uploads(self, names: list[str]) -> None:
        with self._database.transaction() as connection:
            connection.executemany("DELETE FROM files WHERE name = ?", [(name,) for name in names])
        self._files.delete(names)

    def _delete(self, request_ids: list[str]) -> int:
        names: list[str] = []
        for start in range(0, len(request_ids), _BATCH):
            batch = request_ids[start : start + _BATCH]
            with self._database.transaction() as connection:
                for request_id in batch:
                    rows = connection.execute("SELECT name FROM files WHERE request_id = ?", (request_id,)).fetchall()
                    names += [row["name"] for row in rows]
                connection.executemany("DELETE FROM jobs WHERE request_id = ?", [(name,) for name in batch])
            self._queue.evict(batch)
        self._files.delete(names)
        return len(request_ids)


def _share(sizes: Collection[float], room: float) -> float:
    """Return the most bytes that each owner may keep so that all data fits `room`; infinity if it fits already.

    Owners below this limit keep everything.
    """
    for num_left, size in zip(range(len(sizes), 0, -1), sorted(sizes), strict=True):
        if size * num_left > room:
            return room / num_left
        room -= size
    return math.inf
