"""Stand-ins for the queue, the file store and the metrics on a runner, which forward everything to the head."""

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

#: Maximum seconds that a process about to exit waits for the head to acknowledge its crash report.
ACK_TIMEOUT = 5.0


class RunnerQueue:
    """The jobs and outgoing messages of one runner. One thread adds jobs; the worker's threads report on them."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Job, str]] = deque()
        self._jobs_here: dict[str, Job] = {}
        self._contents: dict[str, bytes] = {}
        self._messages: SimpleQueue[Message] = SimpleQueue()
        self._crash_acked = threading.Event()

    # -- called for the head

    def enqueue(self, job: Job, text: str) -> None:
        """Add a job for the worker to claim; `text` is its input as JSON."""
        self._jobs_here[job.request_id] = job
        self._waiting.append((job, text))

    def find(self, request_id: str) -> Job | None:
        """Return the unfinished job with this id; None if it is not here."""
        return self._jobs_here.get(request_id)

    def messages(self) -> list[Message]:
        """Wait for at least one message; return all that are pending."""
        messages = [self._messages.get()]
        while True:
            try:
                messages.append(self._messages.get_nowait())
            except Empty:
                return messages

    def ack_crash(self) -> None:
        """End the wait of `record_crash`, because the head has recorded the crash."""
        self._crash_acked.set()

    def send(self, message: Message) -> None:
        """Send a message to the head."""
        self._messages.put(message)

    @property
    def input_names(self) -> set[str]:
        """The names of the input files of all unfinished jobs here."""
        return {name for job in list(self._jobs_here.values()) for name in job.input_files.values()}

    # -- called by the worker: `JobSource`

    def claim(self, *, include_low_priority: bool = True, slots: int = 1) -> tuple[Job, str] | None:
        """Return the next job and its input as JSON, or None. The arguments are unused: the head applied the limits."""
        return self._waiting.popleft() if self._waiting else None

    def progress(self, job: Job, step: int, num_steps: int) -> None:
        """Report a completed step, with the job's preview if there is one."""
        preview, job.preview = job.preview, None
        self.send(JobProgress(job.request_id, step, num_steps, preview))

    def log(self, job: Job, message: str, level: str = "INFO") -> None:
        """Add a line to the job's log."""
        self.send(JobLog(job.request_id, message, level))

    def finish(self, job: Job, outcome: Outcome) -> bool:
        """Send the outcome and its files to the head, which decides whether to keep them; return True."""
        contents = {file.name: self._contents.pop(file.name) for file in outcome.files}
        self._jobs_here.pop(job.request_id, None)
        self.send(JobFinished(job.request_id, outcome, contents))
        return True

    def record_crash(self, jobs: Sequence[Job]) -> None:
        """Report the crash; wait up to ACK_TIMEOUT for the head to acknowledge it, because the process exits next."""
        self.send(CrashReported([job.request_id for job in jobs]))
        self._crash_acked.wait(ACK_TIMEOUT)

    def release(self, job: Job) -> None:
        """Hand a job back to the head, because this process will not finish it."""
        self._jobs_here.pop(job.request_id, None)
        self.send(JobReleased(job.request_id))

    # -- called by the worker: `FileSink`

    def create(self, content: bytes, extension: str, content_type: str, owner: str, lifecycle: Lifecycle) -> StoredFile:
        """Hold a file in memory until its job ends; return its description.

        The head writes the file, and sets its expiry by the head's clock.
        """
        name = generate_file_name(extension)
        self._contents[name] = content
        return StoredFile(name, owner, len(content), content_type, is_private=lifecycle.is_private)

    def delete(self, names: list[str]) -> None:
        """Drop files of a discarded outcome from memory."""
        for name in names:
            self._contents.pop(name, None)


class RunnerMetrics(Metrics):
    """The metrics of a runner, which are sent to the head and counted there."""

    def __init__(self, queue: RunnerQueue) -> None:
        super().__init__()
        self._queue = queue

    def observe_step(self, size: tuple[int, int], acceleration: str, seconds: float) -> None:
        """Report the duration of one forward pass."""
        self._queue.send(StepMeasured(size, acceleration, seconds))

    def count_images(self, endpoint: str, num_images: int, num_flagged: int) -> None:
        """Report the images of one request, and how many of them are flagged as unsafe."""
        self._queue.send(ImagesGenerated(endpoint, num_images, num_flagged))
