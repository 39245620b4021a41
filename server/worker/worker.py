"""The worker: a thread that owns the engines of one GPU, claims jobs, and takes one step at a time."""

import io
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pybase64

from models.base import DeviceLost, EngineConfig, LoadProgress, Model
from server.errors import ClientCancelled, DiskFull
from server.metrics import Metrics
from server.queue.jobs import Job, Mode, Outcome
from server.queue.notifier import WORKER, Notifier
from server.settings import Settings
from server.status import GpuStatus
from server.storage.database import CorruptDatabase
from server.storage.durable import wait_for_room
from server.worker.crash_recorder import CrashRecorder
from server.worker.engine_pool import EnginePool
from server.worker.interfaces import FileSink, JobSource
from server.worker.pending_jobs import PendingJobs
from server.worker.postprocessor import SHUTDOWN_MARGIN, Postprocessor
from server.worker.results import ResultBuilder
from server.worker.running_job import RunningJob, outcome_from_exception
from server.worker.scheduler import FairScheduler
from server.worker.watchdog import Watchdog, abort_process

log = logging.getLogger(__name__)

#: Maximum previews per request.
PREVIEWS = 10
#: Seconds that `stop` waits beyond the grace period: the postprocessor's margin, and time to release jobs.
_STOP_MARGIN = SHUTDOWN_MARGIN + 0.5


class Worker:
    """The worker of one GPU, or of the CPU. Tests call `run_once` instead of starting its thread."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Model],
        configs: Mapping[str, EngineConfig],
        queue: JobSource,
        files: FileSink,
        input_path: Callable[[str], Path],
        notifier: Notifier,
        metrics: Metrics | None = None,
        crash_recorder: CrashRecorder | None = None,
    ) -> None:
        """Set up the worker. `input_path` returns the path of an input file with the given name."""
        self._metrics = metrics or Metrics()
        self._settings = settings
        self._queue = queue
        self._notifier = notifier
        self._engines = EnginePool(
            models, configs, settings.max_loaded, self._report_loading, notifier.work_available.set
        )
        self._pending = PendingJobs(settings, models, queue, self._engines, input_path)
        self._running: list[RunningJob] = []
        self._scheduler = FairScheduler()
        self._watchdog = Watchdog(
            settings.step_deadline,
            self._on_step_timeout,
            on_change=crash_recorder.set_running if crash_recorder else None,
        )
        results = ResultBuilder(files, embeds_parameters=settings.embed_parameters)
        self._postprocessor = Postprocessor(queue, results, notifier, self._watchdog, self.fail, self._metrics)
        self._stop_at: float | None = None
        self.is_ready = False
        self.loading = LoadProgress()
        #: The error that stopped the worker; None if there was none.
        self.failure: BaseException | None = None
        self._failure_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        """Start the thread, which loads the weights and then runs jobs."""
        self._thread.start()

    def stop(self) -> None:
        """Stop claiming, finish running jobs within --shutdown-grace, release the rest, then return."""
        was_ready, self.is_ready = self.is_ready, False
        self._stop_at = self._stop_at or time.monotonic() + self._settings.shutdown_grace
        self._notifier.work_available.set()
        # Do not wait for a worker that is still loading: loading takes long, and nothing is lost if the process ends
        # meanwhile. If a step does not end in time, the next start of the server requeues its job.
        if was_ready:
            self._thread.join(self._settings.shutdown_grace + _STOP_MARGIN)

    def setup(self) -> None:
        """Load as many engines as fit, and set `is_ready`. Raises the first error of a load."""
        self._engines.setup()
        self.is_ready = True

    def gpus(self) -> Sequence[GpuStatus]:
        """Return the status of this worker's GPU, as a list of one. May be called from any thread."""
        num_running = len(self._running) + len(self._pending.jobs) + len(self._postprocessor)
        return [GpuStatus("0", "ready" if self.is_ready else "loading", "", num_running, 0, self._engines.info())]

    def run_once(self) -> bool:
        """Take a step and finish a job, both on the calling thread; return False if there is nothing to do.

        Raises DiskFull and DeviceLost.
        """
        has_stepped = self.step_once()
        return self._postprocessor.run_once() or has_stepped

    def step_once(self) -> bool:
        """Claim jobs up to --max-running, then advance one job by one step or image; return False if no job runs.

        Raises DiskFull and DeviceLost.
        """
        self._start_jobs()
        if not self._running:
            return False
        running = self._scheduler.in_turn(self._running)[0]
        try:
            end = self._advance(running)
        except DeviceLost:
            raise
        except Exception as error:
            end = outcome_from_exception(error, running.job)
        if end is not None:
            self._running.remove(running)
            self._postprocessor.add(running.job, end)
        return True

    # -- steps

    def _start_jobs(self) -> None:
        """Claim jobs up to --max-running, and start those that can run now. This may load weights first."""
        if self._stop_at is None:
            self._pending.claim(self._running, len(self._postprocessor))
        in_use = {running.engine for running in self._running} | self._postprocessor.engines
        for job, started in self._pending.start_ready(in_use):
            if isinstance(started, RunningJob):
                self._scheduler.add(started, self._running)
                self._running.append(started)
            else:
                self._postprocessor.add(job, started)

    def _advance(self, running: RunningJob) -> RunningJob | Outcome | None:
        """Advance a job by one step or one image. Return None while this thread has more to do for the job.

        Otherwise, return what the postprocessor needs to finish the job: `running`, or the outcome of a cancelled job.
        """
        if running.job.is_cancelled:
            return Outcome.from_error(ClientCancelled())
        if not running.steps_done:
            candidates = self._batch_candidates(running)
            with self._watched([running.job, *(other.job for other in candidates)]):
                self._step(running, candidates)
        elif not running.engine.decodes_concurrently:
            with self._watched([running.job]):
                running.decode_next()
        is_left = running.steps_done and running.engine.decodes_concurrently
        return running if running.is_decoded or is_left else None

    def _batch_candidates(self, running: RunningJob) -> list[RunningJob]:
        """Return the other jobs that may share the next forward pass of this job.

        A job with a crash count runs alone, so that a further crash is charged to no other job.
        """
        return [
            other
            for other in self._scheduler.in_turn(self._running)
            if other is not running and other.engine is running.engine
            if not (other.steps_done or other.job.is_cancelled) and other.job.priority == running.job.priority
            if not (other.job.crash_count or running.job.crash_count)
        ]

    @contextmanager
    def _watched(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Charge a crash to these jobs if the block hangs or loses the device."""
        try:
            with self._watchdog.watch(jobs):
                yield
        except DeviceLost:
            self._queue.record_crash(jobs)
            raise

    def _step(self, running: RunningJob, candidates: Sequence[RunningJob]) -> None:
        """Take one step of a job, and of the candidates that share its forward pass."""
        before = {id(member.task): member.task.work for member in (running, *candidates)}
        started = time.perf_counter()
        advanced = running.engine.advance(running.task, [other.task for other in candidates])
        seconds = time.perf_counter() - started
        self._metrics.observe_step(running.task.size, running.task.acceleration, seconds)
        stepped = {id(task) for task in advanced}
        for member in (running, *candidates):
            if id(member.task) in stepped:
                member.seconds += seconds
                self._scheduler.charge(member, member.task.work - before[id(member.task)])
                self._report_progress(member)

    def _report_progress(self, running: RunningJob) -> None:
        """Report a completed step. If previews are wanted and allowed, make one every few steps."""
        job, task = running.job, running.task
        every = math.ceil(task.num_steps / PREVIEWS)
        is_wanted = job.mode == Mode.STREAM or job.wants_previews
        # The safety checker sees only finished images, so no previews are sent if the operator enforces the checker.
        is_allowed = not self._settings.enforce_safety_checker
        if is_wanted and is_allowed and task.step % every == 0 and not running.steps_done:
            job.preview = _preview(running)
        self._queue.progress(job, task.step, task.num_steps)

    # -- the threads

    def _run(self) -> None:
        try:
            self.setup()
            log.info("ready")
            self._postprocessor.start()
            self._watchdog.start()
            self._engines.start_warming_up()
            while self._is_wanted():
                if not self._try_step():
                    self._notifier.work_available.wait(self._grace_left())
                # Clear before the next check: work that arrives after that check sets the event again.
                self._notifier.work_available.clear()
            for job in (*(running.job for running in self._running), *self._pending.jobs):
                self._queue.release(job)
            self._postprocessor.stop(self._stop_at or time.monotonic())
        except BaseException as error:
            self.fail(error)
        finally:
            self._watchdog.stop()

    def _try_step(self) -> bool:
        try:
            return self.step_once()
        except DiskFull as error:
            wait_for_room(error, log, self._notifier.work_available.wait)
            return True

    def _is_wanted(self) -> bool:
        if self._stop_at is None or self.failure is not None:
            return self.failure is None
        return bool(self._running or self._postprocessor) and time.monotonic() < self._stop_at

    def _grace_left(self) -> float | None:
        """Return the seconds left of the grace period; None unless the worker is stopping."""
        return None if self._stop_at is None else max(0.0, self._stop_at - time.monotonic())

    def _report_loading(self, endpoint: str, loading: LoadProgress) -> None:
        """Report loading progress: to the log, to /health/ready, and to the logs of the jobs that wait for weights."""
        self.loading = loading
        unit, name = (1e9, "GB") if loading.total_bytes >= 1e9 else (1e6, "MB")
        done, total = loading.loaded_bytes / unit, loading.total_bytes / unit
        message = f"loading {loading.component}, {done:.1f} of {total:.1f} {name} loaded"
        log.info("%s: %s", endpoint, message, extra={"loading": loading})
        for job in self._pending.jobs:
            self._queue.log(job, f"{endpoint}: {message}")

    def fail(self, error: BaseException) -> None:
        """Stop the worker because of `error`; do nothing after an earlier error. May be called from any thread."""
        with self._failure_lock:
            if self.failure is not None:
                return
            self.failure = error
        # One line is enough for errors that the operator can fix; others need the stack trace.
        explains_itself = isinstance(error, OSError | CorruptDatabase)
        log.error("the worker stopped, so its process ends: %s", error, exc_info=None if explains_itself else error)
        self._notifier.work_available.set()
        self._notifier.notify(WORKER)

    def _on_step_timeout(self, jobs: Sequence[Job]) -> None:
        try:
            self._queue.record_crash(jobs)
        finally:
            # The process must end even if the disk is full.
            abort_process(self._settings.step_deadline, jobs)


def _preview(running: RunningJob) -> str | None:
    """Return a preview as a JPEG in a data URI; None if there is none yet or if it fails, which is logged."""
    try:
        image = running.engine.preview(running.task)
    except Exception:
        extra = {"request_id": running.job.request_id}
        log.exception("the preview of step %d failed; the request continues", running.task.step, extra=extra)
        return None
    if image is None:
        return None
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{pybase64.b64encode(content.getvalue()).decode()}"
