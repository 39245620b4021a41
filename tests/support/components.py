"""The server's components on a separate data directory, with a clock that tests set."""

import asyncio
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from models.flux_dev import FluxDevInput
from models.image_size import Limits
from server.inputs.cache import INPUTS, InputCache, size_of
from server.inputs.resolver import InputResolver
from server.net.outbound import OutboundClient
from server.queue.jobs import Job, Outcome, Provenance, State, Submission
from server.queue.notifier import Notifier
from server.queue.pending_storage import PendingStorage
from server.queue.queue import Queue
from server.storage.database import Database
from server.storage.file_store import FileStore, StoredFile

#: SQLite's own maximum of max_page_count, far more pages than any test writes.
_NO_LIMIT = 1_073_741_823


@dataclass
class Clock:
    """A clock in seconds since 1970 that stands still until a test sets `now`."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Components:
    """The components of a server, without its sockets and models."""

    data_dir: Path
    database: Database
    notifier: Notifier
    clock: Clock
    queue: Queue
    files: FileStore
    inputs: InputResolver

    def rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run an SQL statement, also one that writes; return the rows of its result."""
        return [tuple(row) for row in self.database.read(sql, *parameters)]

    def stored_file_names(self) -> list[str]:
        """List the names in the directory of stored files."""
        return sorted(path.name for path in (self.data_dir / "files").iterdir())


@contextmanager
def open_components(
    directory: Path,
    *,
    max_length: int = 1000,
    clock: Clock | None = None,
    max_length_per_owner: int = 0,
    max_running_per_owner: int = 0,
    queue_type: type[Queue] = Queue,
) -> Iterator[Components]:
    """Open the components until the block ends; opening the same directory again acts like a restart."""
    clock = clock or Clock()
    database, notifier = Database(directory), Notifier()
    try:
        pending_storage = PendingStorage(partial(size_of, directory / INPUTS))
        queue = queue_type(
            database,
            notifier,
            max_length,
            clock,
            pending_storage=pending_storage,
            max_length_per_owner=max_length_per_owner,
            max_running_per_owner=max_running_per_owner,
        )
        files = FileStore(directory / "files", database, clock)
        cache = InputCache(directory / INPUTS, pending_storage.file_names, 10**10, clock)
        outbound = OutboundClient(("127.0.0.0/8",))
        inputs = InputResolver(cache, outbound, files, Limits(), pending_bytes=pending_storage.num_bytes)
        yield Components(directory, database, notifier, clock, queue, files, inputs)
    finally:
        database.close()


@contextmanager
def full_disk(components: Components) -> Iterator[None]:
    """Forbid SQLite to add a page during the block, so that a write fails as on a full disk."""
    components.rows("PRAGMA max_page_count = 1")
    try:
        yield
    finally:
        components.rows(f"PRAGMA max_page_count = {_NO_LIMIT}")


def submission(endpoint: str = "test/null", *, fields: dict[str, Any] | None = None, **changes: Any) -> Submission:
    """Build a request; `fields` are fields of the model's input, `changes` are attributes of the Submission."""
    model_input = FluxDevInput.model_validate({"prompt": "x", "seed": 7, **(fields or {})})
    default = Submission(endpoint, "me", model_input.model_dump_json(), "http://here", body_hash="0" * 64)
    return dataclasses.replace(default, **changes)


#: How the images of `success` were made.
PROVENANCE = Provenance(acceleration="none", dtype="float32", weights="safetensors", memory="resident")


def success(body: str = '{"seed":7}', *files: StoredFile) -> Outcome:
    """Build the outcome of a job that succeeded."""
    return Outcome(200, body, inference_time=1.5, provenance=PROVENANCE, files=files)


def claim_job(components: Components, **changes: Any) -> Job:
    """Submit a job and claim it; return the running job."""
    components.queue.submit(submission(**changes))
    jobs = components.queue.claim()
    assert jobs
    return jobs[0]


def finish_job(components: Components, *files: StoredFile, **changes: Any) -> Job:
    """Submit, claim and finish a job that succeeds with these files; return the job."""
    job = claim_job(components, **changes)
    assert components.queue.finish(job, success('{"seed":7}', *files))
    return job


async def wait_for_state(components: Components, job: Job, state: State) -> None:
    """Wait until another thread or task has put the job into this state."""
    components.notifier.bind_loop(asyncio.get_running_loop())
    with components.notifier.subscribe(job.request_id) as event:
        while job.state != state:
            event.clear()
            # Check again: the event may have been set between the first check and the clear.
            if job.state != state:
                await event.wait()
