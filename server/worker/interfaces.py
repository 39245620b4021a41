"""Interfaces of a worker to its jobs and files, which are local or behind the head of a cluster."""

from collections.abc import Sequence
from typing import Protocol

from server.queue.jobs import Job, Outcome
from server.storage.file_store import Lifecycle, StoredFile


class JobSource(Protocol):
    """The source of a worker's jobs and the receiver of their outcomes: the queue, or a runner queue."""

    def claim(self, *, include_low_priority: bool = True, slots: int = 1) -> tuple[Job, str] | None:
        """Claim the next job and its input; None if none waits. Skip low priority unless `include_low_priority`.

        `slots` is how many requests of one priority run at a time; owners get equal shares of them.
        """

    def progress(self, job: Job, step: int, num_steps: int) -> None:
        """Report a completed step; `job.preview` holds its preview, if there is one."""

    def log(self, job: Job, message: str, level: str = "INFO") -> None:
        """Add a line to the job's log."""

    def finish(self, job: Job, outcome: Outcome) -> bool:
        """Finish a running job; return False if its outcome is discarded. Raises DiskFull."""

    def record_crash(self, jobs: Sequence[Job]) -> None:
        """Add one to the crash count of these jobs, before the process exits while running them."""

    def release(self, job: Job) -> None:
        """Return a running job to its old place in the queue, because this process will not finish it."""


class FileSink(Protocol):
    """The destination of a worker's images: the file store, or a stand-in on another machine."""

    def create(self, content: bytes, extension: str, content_type: str, owner: str, lifecycle: Lifecycle) -> StoredFile:
        """Store bytes durably. Raises DiskFull."""

    def delete(self, names: list[str]) -> None:
        """Delete files of a discarded outcome."""
