"""One GPU's place in the cluster: one runner after the other, and the jobs that the present one has."""

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

#: Seconds before the next try, after so many runners in a row that never painted.
RESTART_BACKOFF = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
#: What requests bring along is in memory for one of them at a time, whatever seats they go to.
_INPUT_TRANSFER_LOCK = threading.Lock()


class GpuSlot:
    """`on_change` is called from its thread when there may be room, and when a runner comes or goes."""

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
        #: What the present runner has, by request id.
        self.jobs: dict[str, Job] = {}
        self._with_previews: set[str] = set()
        self.loading, self.is_ready, self.is_closing = LoadProgress(), False, False
        self._engines: Mapping[str, EngineInfo] = {}
        self._runner: RunnerHandle | None = None
        self._num_lost, self._failure = 0, ""
        #: Runners so far.
        self.incarnation = 0
        self.idle_since = time.monotonic()
        # Over the jobs and the link, so that no job is given to a runner that is being given up.
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"seat-{number}", daemon=True)

    def start(self) -> None:
        """Ask for a GPU, and paint on it."""
        self._thread.start()

    def close(self) -> None:
        """Let the GPU go, at once where it has nothing to do; after its jobs otherwise."""
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
        """Wait for that, until this moment of the monotonic clock at the latest."""
        self._thread.join(max(0.0, until - time.monotonic()))

    def kill(self) -> None:
        """Wait no more: what is left goes back to the queue."""
        with self._lock:
            runner = self._runner
        if runner:
            runner.kill()

    @property
    def is_stopped(self) -> bool:
        """Whether its GPU was let go."""
        return not self._thread.is_alive()

    @property
    def has_gpu(self) -> bool:
        """Whether it has one: its runner loads there, or paints."""
        runner = self._runner
        return bool(runner and runner.node)

    # -- what it is given

    @property
    def accepts_jobs(self) -> bool:
        """Whether it takes jobs."""
        return self.is_ready and not self.is_closing

    @property
    def load(self) -> tuple[int, int]:
        """How many jobs it has, and how many of them are of low priority."""
        jobs = list(self.jobs.values())
        return len(jobs), sum(job.priority == Priority.LOW for job in jobs)

    def assign(self, job: Job, text: str) -> None:
        """One more job. It is lost with the runner, if that is what happens."""
        with self._lock:
            runner = self._runner
            if runner:
                self.jobs[job.request_id] = job
        if runner is None:
            self._retry(lambda: self._queue.release(job))
        elif job.input_files:
            # It may be a gigabyte, and others wait for other GPUs.
            threading.Thread(target=self._send, args=(runner, job, text), daemon=True).start()
        else:
            self._send(runner, job, text)

    def _send(self, runner: RunnerHandle, job: Job, text: str) -> None:
        try:
            with _INPUT_TRANSFER_LOCK if job.input_files else contextlib.nullcontext():
                runner.send_job(job, text)
        except RunnerLost as error:
            # With all that it has, which goes elsewhere; this one would only fail here again.
            log.error("GPU %d: a request could not be handed over: %s", self.number, error)
            runner.kill()
        except Exception as error:
            # Unless it went back to the queue meanwhile, with the runner.
            if self._runner is runner:
                outcome = outcome_from_exception(error, job)
                self._retry(lambda: self._queue.finish(job, outcome))
                self._remove(job)
        # Since it was claimed, when nobody could be told yet.
        if job.is_cancelled:
            runner.cancel(job.request_id)

    def cancel(self, job: Job) -> None:
        """One of its jobs is to end; returns when the runner knows, or is gone."""
        with self._lock:
            runner = self._runner
        if runner:
            runner.cancel(job.request_id)

    def gpu(self) -> GpuStatus:
        """What an operator is told of it."""
        runner = self._runner
        node = runner.node if runner else ""
        state = "loading" if node else "waiting"
        if self.is_ready:
            state = "leaving" if self.is_closing else "ready"
        return GpuStatus(str(self.number), state, node, len(self.jobs), self._num_lost, self._engines, self._failure)

    # -- its thread

    def _run(self) -> None:
        num_failed = 0
        while not self._stopped.wait(RESTART_BACKOFF[min(num_failed, len(RESTART_BACKOFF) - 1)]):
            num_failed += 1
            try:
                num_failed = 0 if self._run_runner() else num_failed
            except Exception as error:
                # Of the head itself, such as its database: only a new process puts everything back.
                self._on_failure(error)
                return

    def _run_runner(self) -> bool:
        """One runner, from its start to its end; whether it could paint."""
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
                self._num_lost, self._failure = self._num_lost + 1, str(error)
                log.warning("GPU %d: its runner is gone: %s", self.number, error)
        finally:
            with self._lock:
                self._runner, self.is_ready = None, False
            runner.kill()
            self._requeue_all(runner)
            self._engines = {}
            self._on_change(self)
        return was_ready

    def _requeue_all(self, runner: RunnerHandle) -> None:
        """What the runner had goes elsewhere, or ends because this was too often."""
        if self.jobs and not self._stopped.is_set() and (crashed := runner.crashed_jobs()):
            jobs = [job for job in self.jobs.values() if job.request_id in crashed]
            log.error(
                "GPU %d: its runner died of a fault of its own while it worked at %s", self.number, ", ".join(crashed)
            )
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
                raise RunnerLost("it could not take in what came along with a request")
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
                # Its own level holds here too.
                if logger.isEnabledFor(message.record.levelno):
                    logger.handle(message.record)
            case messages.RunnerStopped() if message.failure is not None:
                raise RunnerLost(message.failure)

    def _finish(self, job: Job, ended: messages.JobFinished) -> None:
        """Its files on the disk of the head, then its row. Raises DiskFull; tried again, it writes the same files.

        Raises ImplausibleMessage for a file that is there already: it is somebody else's.
        """
        if any(self._files.is_listed(each.name) for each in ended.outcome.files):
            raise message_checks.ImplausibleMessage("it reported a file that is there already")
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
        """Until the disk has room for it."""
        while True:
            try:
                func()
                return
            except DiskFull as error:
                wait_for_room(error, log, time.sleep)
