"""A runner's stand-in for the queue, the file store and the metrics, on a machine that has none of them."""

import threading
from collections import deque
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from server.cluster.messages import (
    CrashReported,
    ImagesGenerated,
    JobFinished,
    JobLog,
    JobProgress,
    JobReleased,
    Message,
    StepMeasured,
)
from server.metrics import Metrics
from server.queue.jobs import Job, Outcome
from server.storage.file_store import Lifecycle, StoredFile, generate_file_name

#: Seconds that a process which is about to end waits for its last words to be heard.
ACK_TIMEOUT = 5.0


class RunnerQueue:
    """Jobs are put in from one thread, taken by the worker's, and reported on from both of the worker's."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Job, str]] = deque()
        self._jobs_here: dict[str, Job] = {}
        self._contents: dict[str, bytes] = {}
        self._messages: SimpleQueue[Message] = SimpleQueue()
        self._crash_acked = threading.Event()

    # -- what the head does

    def enqueue(self, job: Job, text: str) -> None:
        """One more job to paint."""
        self._jobs_here[job.request_id] = job
        self._waiting.append((job, text))

    def find(self, request_id: str) -> Job | None:
        """A job that is here still."""
        return self._jobs_here.get(request_id)

    def messages(self) -> list[Message]:
        """What there is to report, at least one; waits for it."""
        found = [self._messages.get()]
        while True:
            try:
                found.append(self._messages.get_nowait())
            except Empty:
                return found

    def ack_crash(self) -> None:
        """The strike was remembered."""
        self._crash_acked.set()

    def send(self, message: Message) -> None:
        """Report this."""
        self._messages.put(message)

    @property
    def input_names(self) -> set[str]:
        """The files that came along with the jobs that are here."""
        return {name for job in list(self._jobs_here.values()) for name in job.input_files.values()}

    # -- what the worker does: `JobSource`

    def claim(self, *, include_low_priority: bool = True, slots: int = 1) -> tuple[Job, str] | None:
        """The next job; the head has seen to the limits."""
        return self._waiting.popleft() if self._waiting else None

    def progress(self, job: Job, step: int, num_steps: int) -> None:
        """One more step is done."""
        preview, job.preview = job.preview, None
        self.send(JobProgress(job.request_id, step, num_steps, preview))

    def log(self, job: Job, message: str, level: str = "INFO") -> None:
        """Add one line to the job's log."""
        self.send(JobLog(job.request_id, message, level))

    def finish(self, job: Job, outcome: Outcome) -> bool:
        """Hand its outcome over; whether anybody sees it is decided by the head."""
        contents = {file.name: self._contents.pop(file.name) for file in outcome.files}
        self._jobs_here.pop(job.request_id, None)
        self.send(JobFinished(job.request_id, outcome, contents))
        return True

    def record_crash(self, jobs: Sequence[Job]) -> None:
        """Wait until the head has heard it, because the process ends next."""
        self.send(CrashReported([job.request_id for job in jobs]))
        self._crash_acked.wait(ACK_TIMEOUT)

    def release(self, job: Job) -> None:
        """This process will not finish it."""
        self._jobs_here.pop(job.request_id, None)
        self.send(JobReleased(job.request_id))

    # -- what the worker does: `FileSink`

    def create(self, content: bytes, extension: str, content_type: str, owner: str, lifecycle: Lifecycle) -> StoredFile:
        """Keep bytes until their job ends; when they expire is the head's to say, by its clock."""
        name = generate_file_name(extension)
        self._contents[name] = content
        return StoredFile(name, owner, len(content), content_type, is_private=lifecycle.is_private)

    def delete(self, names: list[str]) -> None:
        """Give up files that nobody will see."""
        for name in names:
            self._contents.pop(name, None)


class RunnerMetrics(Metrics):
    """Tells the desk what the head's metrics count."""

    def __init__(self, queue: RunnerQueue) -> None:
        super().__init__()
        self._queue = queue

    def observe_step(self, size: tuple[int, int], acceleration: str, seconds: float) -> None:
        """One forward."""
        self._queue.send(StepMeasured(size, acceleration, seconds))

    def count_images(self, endpoint: str, num_images: int, num_flagged: int) -> None:
        """The pictures of one request."""
        self._queue.send(ImagesGenerated(endpoint, num_images, num_flagged))
