"""Where a worker has its jobs from, and where it leaves images: on this machine, or by way of the head of a cluster."""

from collections.abc import Sequence
from typing import Protocol

from server.queue.jobs import Job, Outcome
from server.storage.file_store import Lifecycle, StoredFile


class JobSource(Protocol):
    """Where a worker has its jobs from and leaves what becomes of them: the queue, or a stand-in on another machine."""

    def claim(self, *, include_low_priority: bool = True, slots: int = 1) -> tuple[Job, str] | None:
        """The next job and its input; None when none waits. Without `takes_low`, only of normal priority.

        `slots` is how many requests of one priority run at a time: owners get equal shares of them.
        """

    def progress(self, job: Job, step: int, num_steps: int) -> None:
        """One more step is done; its preview, if there is one, is the job's."""

    def log(self, job: Job, message: str, level: str = "INFO") -> None:
        """Add one line to the job's log."""

    def finish(self, job: Job, outcome: Outcome) -> bool:
        """End a running job; False when nobody will see the outcome. Raises DiskFull."""

    def record_crash(self, jobs: Sequence[Job]) -> None:
        """Remember that the process has to end while it works at these jobs."""

    def release(self, job: Job) -> None:
        """Put a running job back in its old place, because this process will not finish it."""


class FileSink(Protocol):
    """Where a worker leaves pictures: the file store, or a stand-in on another machine."""

    def create(self, content: bytes, extension: str, content_type: str, owner: str, lifecycle: Lifecycle) -> StoredFile:
        """Keep bytes for good. Raises DiskFull."""

    def delete(self, names: list[str]) -> None:
        """Give up files that nobody will see."""
