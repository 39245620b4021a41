"""A runner's stand-in for the queue, the file store and the metrics, on a machine that has none of them."""

import threading
from collections import deque
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from server.cluster.messages import Ended, Line, Painted, Progress, Report, Returned, Stepped, Struck
from server.metrics import Metrics
from server.queue.jobs import Job, Outcome
from server.storage.file_store import Lifecycle, StoredFile, generate_file_name

#: Seconds that a process which is about to end waits for its last words to be heard.
LAST_WORDS = 5.0


class Desk:
    """Jobs are put in from one thread, taken by the worker's, and reported on from both of the worker's."""

    def __init__(self) -> None:
        self._jobs: deque[tuple[Job, str]] = deque()
        self._held: dict[str, Job] = {}
        self._contents: dict[str, bytes] = {}
        self._reports: SimpleQueue[Report] = SimpleQueue()
        self._heard = threading.Event()

    # -- what the head does

    def put(self, job: Job, text: str) -> None:
        """One more job to paint."""
        self._held[job.request_id] = job
        self._jobs.append((job, text))

    def find(self, request_id: str) -> Job | None:
        """A job that is here still."""
        return self._held.get(request_id)

    def reports(self) -> list[Report]:
        """What there is to report, at least one; waits for it."""
        found = [self._reports.get()]
        while True:
            try:
                found.append(self._reports.get_nowait())
            except Empty:
                return found

    def hear(self) -> None:
        """The strike was remembered."""
        self._heard.set()

    def tell(self, report: Report) -> None:
        """Report this."""
        self._reports.put(report)

    @property
    def names(self) -> set[str]:
        """The files that came along with the jobs that are here."""
        return {name for job in list(self._held.values()) for name in job.input_files.values()}

    # -- what the worker does: `Source`

    def claim(self, *, takes_low: bool = True, slots: int = 1) -> tuple[Job, str] | None:
        """The next job; the head has seen to the limits."""
        return self._jobs.popleft() if self._jobs else None

    def progress(self, job: Job, step: int, num_steps: int) -> None:
        """One more step is done."""
        preview, job.preview = job.preview, None
        self.tell(Progress(job.request_id, step, num_steps, preview))

    def log(self, job: Job, message: str, level: str = "INFO") -> None:
        """Add one line to the job's log."""
        self.tell(Line(job.request_id, message, level))

    def finish(self, job: Job, outcome: Outcome) -> bool:
        """Hand its outcome over; whether anybody sees it is decided by the head."""
        contents = {file.name: self._contents.pop(file.name) for file in outcome.files}
        self._held.pop(job.request_id, None)
        self.tell(Ended(job.request_id, outcome, contents))
        return True

    def strike(self, jobs: Sequence[Job]) -> None:
        """Wait until the head has heard it, because the process ends next."""
        self.tell(Struck([job.request_id for job in jobs]))
        self._heard.wait(LAST_WORDS)

    def give_back(self, job: Job) -> None:
        """This process will not finish it."""
        self._held.pop(job.request_id, None)
        self.tell(Returned(job.request_id))

    # -- what the worker does: `Store`

    def save(self, content: bytes, ending: str, content_type: str, owner: str, lifecycle: Lifecycle) -> StoredFile:
        """Keep bytes until their job ends; when they expire is the head's to say, by its clock."""
        name = generate_file_name(ending)
        self._contents[name] = content
        return StoredFile(name, owner, len(content), content_type, is_private=lifecycle.is_private)

    def remove(self, names: list[str]) -> None:
        """Give up files that nobody will see."""
        for name in names:
            self._contents.pop(name, None)


class ReportedMetrics(Metrics):
    """Tells the desk what the head's metrics count."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk

    def observe_step(self, size: tuple[int, int], acceleration: str, seconds: float) -> None:
        """One forward."""
        self._desk.tell(Stepped(size, acceleration, seconds))

    def count_images(self, endpoint: str, num_pictures: int, num_flagged: int) -> None:
        """The pictures of one request."""
        self._desk.tell(Painted(endpoint, num_pictures, num_flagged))
