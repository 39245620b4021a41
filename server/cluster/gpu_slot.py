"""Supervision of one GPU: restarts its runner and tracks the runner's jobs."""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping

from models.base import EngineInfo, LoadProgress
from server.cluster import message_checks, messages
from server.cluster.ray_backend import RunnerHandle, RunnerLost
from server.errors import DiskFull
from server.metrics import Metrics
from server.queue.jobs import Job, Priority
from server.queue.queue import Queue
from server.status import GpuStatus
from server.storage.durable import wait_for_room
from server.storage.file_store import FileStore
from server.worker.running_job import outcome_from_exception

log = logging.getLogger(__name__)

#: Seconds to wait before the next runner is started, by how many runners in a row ended before they were ready.
RESTART_BACKOFF = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
#: Held while input files are sent. All slots share it, so that the head has the files of only one request in memory.
_INPUT_TRANSFER_LOCK = threading.Lock()


class GpuSlot:
    """One GPU slot of the cluster, with its own thread.

    The slot calls `on_change` from any thread when its jobs, its runner or its readiness change. It calls `on_failure`
    when the head itself fails.
    """

    def __init__(
        self,
        number: int,
        start_runner: Callable[[], RunnerHandle],
        queue: Queue,
        files: FileStore,
        metrics: Metrics,
        on_change: Callable[["GpuSlot"], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.number = number
        self._start_runner = start_runner
        self._queue, self._files, self._metrics, self._on_change = queue, files, metrics, on_change
        self._on_failure = on_failure
        #: Jobs of the current runner, by request id.
        self.jobs: dict[str, Job] = {}
        self._with_previews: set[str] = set()
        self.loading, self.is_ready, self.is_closing = LoadProgress(), False, False
        self._engines: Mapping[str, EngineInfo] = {}
        self._runner: RunnerHandle | None = None
        self._num_restarts, self._failure = 0, ""
        #: Number of runners started so far.
        self.incarnation = 0
        #: Monotonic time when the runner became ready, or when a job last left it.
        self.idle_since = time.monotonic()
        # Guards the jobs and the runner handle, so that no job goes to a runner that is being dropped.
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"gpu-slot-{number}", daemon=True)

    def start(self) -> None:
        """Start the thread, which requests a GPU and runs jobs on it."""
        self._thread.start()

    def close(self) -> None:
        """Begin to release the GPU: after its current jobs if the runner is ready, otherwise immediately."""
        self.is_closing = True
        self._stopped.set()
        self._on_change(self)
        with self._lock:
            runner = self._runner
        if runner and self.is_ready:
            runner.stop()
        elif runner:
            runner.kill()

    def join(self, until: float) -> None:
        """Wait until the GPU is released, at most until `until` on the monotonic clock."""
        self._thread.join(max(0.0, until - time.monotonic()))

    def kill(self) -> None:
        """Kill the runner now; its remaining jobs return to the queue."""
        with self._lock:
            runner = self._runner
        if runner:
            runner.kill()

    @property
    def is_stopped(self) -> bool:
        """Whether the slot's thread has ended and its GPU is released."""
        return not self._thread.is_alive()

    @property
    def has_gpu(self) -> bool:
        """Whether the slot's runner has a GPU."""
        runner = self._runner
        return bool(runner and runner.node)

    # -- jobs

    @property
    def accepts_jobs(self) -> bool:
        """Whether the slot accepts new jobs."""
        return self.is_ready and not self.is_closing

    @property
    def load(self) -> tuple[int, int]:
        """The number of jobs, and how many of them have low priority."""
        jobs = list(self.jobs.values())
        return len(jobs), sum(job.priority == Priority.LOW for job in jobs)

    def assign(self, job: Job, text: str) -> None:
        """Assign a job to the runner. If the runner dies, the job is requeued, or fails after too many attempts."""
        with self._lock:
            runner = self._runner
            if runner:
                self.jobs[job.request_id] = job
        if runner is None:
            self._retry(lambda: self._queue.release(job))
        elif job.input_files:
            # Use another thread: input files may total a gigabyte, and jobs for other GPUs must not wait for them.
            threading.Thread(target=self._send, args=(runner, job, text), daemon=True).start()
        else:
            self._send(runner, job, text)

    def _send(self, runner: RunnerHandle, job: Job, text: str) -> None:
        try:
            with _INPUT_TRANSFER_LOCK if job.input_files else contextlib.nullcontext():
                runner.send_job(job, text)
        except RunnerLost as error:
            # Replace the runner and requeue all its jobs, because a retry on the same runner would fail again.
            log.error("GPU %d: a request could not be sent to the runner, which is restarted: %s", self.number, error)
            runner.kill()
        except Exception as error:
            # If the runner is gone, the job is already back in the queue.
            if self._runner is runner:
                outcome = outcome_from_exception(error, job)
                self._retry(lambda: self._queue.finish(job, outcome))
                self._remove(job)
        # The client may have cancelled before the runner had the job, so tell the runner now.
        if job.is_cancelled:
            runner.cancel(job.request_id)

    def cancel(self, job: Job) -> None:
        """Have the runner cancel a job before its next step; return when it confirms, or after a timeout."""
        with self._lock:
            runner = self._runner
        if runner:
            runner.cancel(job.request_id)

    def gpu(self) -> GpuStatus:
        """Return the slot's status for the operator."""
        runner = self._runner
        node = runner.node if runner else ""
        state = "loading" if node else "waiting"
        if self.is_ready:
            state = "leaving" if self.is_closing else "ready"
        return GpuStatus(
            str(self.number), state, node, len(self.jobs), self._num_restarts, self._engines, self._failure
        )

    # -- the slot's thread

    def _run(self) -> None:
        num_failed = 0
        while not self._stopped.wait(RESTART_BACKOFF[min(num_failed, len(RESTART_BACKOFF) - 1)]):
            num_failed += 1
            try:
                num_failed = 0 if self._run_runner() else num_failed
            except Exception as error:
                # The head itself failed, for example its database: only a new process can recover.
                self._on_failure(error)
                return

    def _run_runner(self) -> bool:
        """Run one runner from start to end; return whether it became ready."""
        runner = self._start_runner()
        with self._lock:
            self._runner = runner
            self.incarnation += 1
        if self.is_closing:
            runner.kill()
        was_ready = False
        try:
            for message in runner.messages():
                self._handle(runner, message)
                was_ready = was_ready or self.is_ready
        except (RunnerLost, message_checks.ImplausibleMessage) as error:
            if not self._stopped.is_set():
                self._num_restarts, self._failure = self._num_restarts + 1, str(error)
                log.warning("GPU %d: starting another runner, because it lost its runner: %s", self.number, error)
        finally:
            with self._lock:
                self._runner, self.is_ready = None, False
            runner.kill()
            self._requeue_all(runner)
            self._engines = {}
            self._on_change(self)
        return was_ready

    def _requeue_all(self, runner: RunnerHandle) -> None:
        """Count a crash if there was one; then requeue the runner's jobs, or fail those that were tried too often."""
        if self.jobs and not self._stopped.is_set() and (crashed := runner.crashed_jobs()):
            jobs = [job for job in self.jobs.values() if job.request_id in crashed]
            log.error("GPU %d: its runner crashed while it ran the requests %s", self.number, ", ".join(crashed))
            self._queue.record_crash(jobs)
        for job in sorted(self.jobs.values(), key=lambda job: job.rank):
            self._retry(lambda job=job: self._queue.requeue_or_fail(job))  # type: ignore[misc]
            self._remove(job)

    def _handle(self, runner: RunnerHandle, message: messages.Message) -> None:
        job = message_checks.check(message, self.jobs)
        match message:
            case messages.JobProgress() if job:
                job.preview = message.preview or job.preview
                self._queue.progress(job, message.step, message.num_steps)
                if job.wants_previews and job.request_id not in self._with_previews:
                    self._with_previews.add(job.request_id)
                    runner.preview(job.request_id)
            case messages.JobLog() if job:
                self._queue.log(job, message.message, message.level)
            case messages.JobFinished() if job:
                self._retry(lambda: self._finish(job, message))
                self._remove(job)
            case messages.JobReleased() if job:
                self._retry(lambda: self._queue.release(job))
                self._remove(job)
            case messages.JobRejected() if job:
                raise RunnerLost("the runner could not store the input files of a request; its log says why")
            case messages.CrashReported():
                self._queue.record_crash([self.jobs[name] for name in message.request_ids if name in self.jobs])
                runner.ack_crash()
            case messages.StepMeasured():
                self._metrics.observe_step(message.size, message.acceleration, message.seconds)
            case messages.ImagesGenerated():
                self._metrics.count_images(message.endpoint, message.num_images, message.num_flagged)
            case _:
                self._handle_state(message)

    def _handle_state(self, message: messages.Message) -> None:
        match message:
            case messages.RunnerState():
                self.loading, self._engines = message.loading, message.engines
                if message.is_ready and not self.is_ready:
                    self.is_ready, self.idle_since, self._failure = True, time.monotonic(), ""
                    self._on_change(self)
            case messages.LogRecord():
                message.record.gpu, message.record.msg = self.number, message.record.msg[: message_checks.MAX_LINE]
                logger = logging.getLogger(message.record.name)
                # The head's own log level applies too.
                if logger.isEnabledFor(message.record.levelno):
                    logger.handle(message.record)
            case messages.RunnerStopped() if message.failure is not None:
                raise RunnerLost(message.failure)

    def _finish(self, job: Job, ended: messages.JobFinished) -> None:
        """Write the job's files on the head, then commit its outcome. A retry writes the same files.

        If a file cannot be written for another reason than a full disk, the job fails. Raises DiskFull, and
        ImplausibleMessage for a file that already exists, because that file belongs to another request.
        """
        if any(self._files.is_listed(each.name) for each in ended.outcome.files):
            raise message_checks.ImplausibleMessage("the runner reported a file that already exists")
        try:
            files = tuple(
                self._files.write(each, ended.contents[each.name], job.lifecycle) for each in ended.outcome.files
            )
            outcome = dataclasses.replace(ended.outcome, files=files)
        except OSError as error:
            files, outcome = (), outcome_from_exception(error, job)
        if not self._queue.finish(job, outcome):
            self._files.delete([file.name for file in files])

    def _remove(self, job: Job) -> None:
        self.jobs.pop(job.request_id, None)
        self._with_previews.discard(job.request_id)
        self.idle_since = time.monotonic()
        self._on_change(self)

    def _retry(self, func: Callable[[], object]) -> None:
        """Call `func`; while the disk is full, try again every second."""
        while True:
            try:
                func()
                return
            except DiskFull as error:
                wait_for_room(error, log, time.sleep)
