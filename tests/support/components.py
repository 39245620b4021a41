"""The server's parts on a folder of their own, with a clock that is set by hand."""

import asyncio
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from models.flux_dev import FluxDevInput
from models.schema import Limits
from server.inputs.cache import INPUTS, InputCache, size_of
from server.inputs.resolver import InputResolver
from server.net.outbound import OutboundClient
from server.queue.jobs import Job, Outcome, State, Submission
from server.queue.notifier import Notifier
from server.queue.pending_storage import PendingStorage
from server.queue.queue import Queue
from server.storage.database import Database
from server.storage.file_store import FileStore, StoredFile

#: More pages than any test writes: SQLite's own limit.
_NO_LIMIT = 1_073_741_823


@dataclass
class Clock:
    """Seconds since 1970, until somebody says otherwise."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Parts:
    """What a server holds besides its sockets and its models."""

    folder: Path
    database: Database
    notifier: Notifier
    clock: Clock
    queue: Queue
    files: FileStore
    inputs: InputResolver

    def rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """What the database says."""
        return [tuple(row) for row in self.database.read(sql, *parameters)]

    def on_disk(self) -> list[str]:
        """The names in the folder of the pictures."""
        return sorted(path.name for path in (self.folder / "files").iterdir())


@contextmanager
def opened(
    folder: Path,
    *,
    max_length: int = 1000,
    clock: Clock | None = None,
    max_length_per_owner: int = 0,
    max_running_per_owner: int = 0,
) -> Iterator[Parts]:
    """The parts for as long as the block lasts; a second time on one folder is a second start."""
    clock = clock or Clock()
    database, notifier = Database(folder), Notifier()
    try:
        needs = PendingStorage(partial(size_of, folder / INPUTS))
        queue = Queue(
            database,
            notifier,
            max_length,
            clock,
            pending_storage=needs,
            max_length_per_owner=max_length_per_owner,
            max_running_per_owner=max_running_per_owner,
        )
        files = FileStore(folder / "files", database, clock)
        cache = InputCache(folder / INPUTS, needs.file_names, 10**10, clock)
        inputs = InputResolver(cache, OutboundClient(("127.0.0.0/8",)), files, Limits(), pending_bytes=needs.num_bytes)
        yield Parts(folder, database, notifier, clock, queue, files, inputs)
    finally:
        database.close()


@contextmanager
def full_disk(parts: Parts) -> Iterator[None]:
    """SQLite may not take one more page, and says what it says on a full disk."""
    parts.rows("PRAGMA max_page_count = 1")
    try:
        yield
    finally:
        parts.rows(f"PRAGMA max_page_count = {_NO_LIMIT}")


def submission(endpoint: str = "test/null", *, fields: dict[str, Any] | None = None, **changes: Any) -> Submission:
    """One request; `fields` are the model's, the rest the queue's."""
    given = FluxDevInput.model_validate({"prompt": "x", "seed": 7, **(fields or {})})
    known = Submission(endpoint, "me", given.model_dump_json(), "http://here", body_hash="0" * 64)
    return dataclasses.replace(known, **changes)


def painted(body: str = '{"seed":7}', *files: StoredFile) -> Outcome:
    """A job that ended well."""
    return Outcome(200, body, inference_time=1.5, acceleration="none", files=files)


def claimed(parts: Parts, **changes: Any) -> Job:
    """A job that was submitted and is running."""
    parts.queue.submit(submission(**changes))
    found = parts.queue.claim()
    assert found
    return found[0]


def finished(parts: Parts, *files: StoredFile, **changes: Any) -> Job:
    """A job that was painted, with its files."""
    job = claimed(parts, **changes)
    assert parts.queue.finish(job, painted('{"seed":7}', *files))
    return job


async def reached(parts: Parts, job: Job, state: State) -> None:
    """Wait until a job that others work at is in this state."""
    parts.notifier.bind_loop(asyncio.get_running_loop())
    with parts.notifier.subscribe(job.request_id) as bell:
        while job.state != state:
            bell.clear()
            # Read again: it may have rung between the look and the clearing.
            if job.state != state:
                await bell.wait()
