"""The interfaces through which a worker gets jobs and stores files, on this machine or on the head of a cluster."""

from collections.abc import Sequence
from typing import Protocol

from server.queue.jobs import Job, Outcome
from server.storage.file_store import Lifecycle, StoredFile


class JobSource(Protocol):
    """The source of a worker's jobs and the receiver of their outcomes: the queue, or a runner queue."""

    def claim(self, *, include_low_priority: bool = True, slots: int = 1) -> tuple[Job, str] | None:
        """Claim the next job; return the job and its input as JSON, or None if there is none. Raises DiskFull.

        Low priority is skipped unless `include_low_priority`. `slots` is how many requests of one priority run at a
        time; owners get equal shares of them.
        """

    def progress(self, job: Job, step: int, num_steps: int) -> None:
        """Report a completed step, of `num_steps` in total; `job.preview` holds its preview, if there is one."""

    def log(self, job: Job, message: str, level: str = "INFO") -> None:
        """Add a line to the job's log."""

    def finish(self, job: Job, outcome: Outcome) -> bool:
        """Finish a running job; return False if it was cancelled, so that the outcome is discarded. Raises DiskFull."""

    def record_crash(self, jobs: Sequence[Job]) -> None:
        """Add one to the crash count of these jobs, because this process must exit while it runs them."""

    def release(self, job: Job) -> None:
        """Return a running job, which this process will not finish, to its old place in the queue. Raises DiskFull."""


class FileSink(Protocol):
    """The destination of a worker's images: the file store, or a runner queue, which sends them to the head."""

    def create(self, content: bytes, extension: str, content_type: str, owner: str, lifecycle: Lifecycle) -> StoredFile:
        """Store bytes under a new name; return the file. Raises DiskFull."""

    def delete(self, names: list[str]) -> None:
        """Delete files of a discarded outcome."""
