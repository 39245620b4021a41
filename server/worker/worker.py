"""Claim, then advance one task by one step at a time: one thread that owns the models."""

import base64
import io
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

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

#: How many previews a picture's client gets at most.
PREVIEWS = 10
#: Seconds beyond the grace until a stop goes on without the worker: the finisher's, and some to give back what is left.
_END = SHUTDOWN_MARGIN + 0.5


class Worker:
    """Paints what the queue holds. `turn` does one piece of work, so tests need no thread."""

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
        """`resolve_input` says where a file lies that a request brought along."""
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
        answers = ResultBuilder(files, embeds_parameters=settings.embed_parameters)
        self._postprocessor = Postprocessor(queue, answers, notifier, self._watchdog, self.fail, self._metrics)
        self._stop_at: float | None = None
        self.is_ready = False
        self.loading = LoadProgress()
        #: Why the thread ended, if it ended by itself.
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        """Begin to load the models, then to paint."""
        self._thread.start()

    def stop(self) -> None:
        """Claim nothing more; finish what runs within the grace, give the rest back; then return."""
        was_ready, self.is_ready = self.is_ready, False
        self._stop_at = self._stop_at or time.monotonic() + self._settings.shutdown_grace
        self._notifier.work_available.set()
        # Loading cannot be interrupted and has nothing to lose; nor has a step that does not end: the next start gives
        # its job back.
        if was_ready:
            self._thread.join(self._settings.shutdown_grace + _END)

    def setup(self) -> None:
        """Load what there is room for. Raises what the first bad one raises."""
        self._engines.setup()
        self.is_ready = True

    def gpus(self) -> Sequence[GpuStatus]:
        """What an operator is told of the one GPU that this worker has; called from any thread."""
        num_running = len(self._running) + len(self._pending.jobs) + len(self._postprocessor)
        return [GpuStatus("0", "ready" if self.is_ready else "loading", "", num_running, 0, self._engines.about())]

    def run_once(self) -> bool:
        """Everything that the threads do, once, on this one; False when there was nothing to do. Raises DiskFull."""
        has_stepped = self.step_once()
        return self._postprocessor.run_once() or has_stepped

    def step_once(self) -> bool:
        """Claim what there is room for, then take one step of one task; False when there was nothing to do."""
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

    # -- task

    def _start_jobs(self) -> None:
        """Claim what there is room for, and begin what can be begun."""
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
        """What is next for this one; its end, when that is known or left to the finisher."""
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
        """Who may share its forward. Those with a strike go alone, so that only who is at fault gets another."""
        return [
            other
            for other in self._scheduler.in_turn(self._running)
            if other is not running and other.engine is running.engine
            if not (other.steps_done or other.job.is_cancelled) and other.job.priority == running.job.priority
            if not (other.job.crash_count or running.job.crash_count)
        ]

    @contextmanager
    def _watched(self, jobs: Sequence[Job]) -> Iterator[None]:
        """A block that does not end, or that loses the device, is a strike against these."""
        try:
            with self._watchdog.watch(jobs):
                yield
        except DeviceLost:
            self._queue.record_crash(jobs)
            raise

    def _step(self, running: RunningJob, candidates: Sequence[RunningJob]) -> None:
        """One step, of this one and of those that share its forward."""
        before = {id(member.task): member.task.work for member in (running, *candidates)}
        started = time.perf_counter()
        advanced = running.engine.advance(running.task, [other.task for other in candidates])
        taken = time.perf_counter() - started
        self._metrics.observe_step(running.task.size, running.task.acceleration, taken)
        stepped = {id(task) for task in advanced}
        for member in (running, *candidates):
            if id(member.task) in stepped:
                member.seconds += taken
                self._scheduler.charge(member, member.task.work - before[id(member.task)])
                self._report_progress(member)

    def _report_progress(self, running: RunningJob) -> None:
        """Progress for who listens; with a preview now and then for those that stream."""
        job, task = running.job, running.task
        every = math.ceil(task.num_steps / PREVIEWS)
        is_wanted = job.mode == Mode.STREAM or job.wants_previews
        # The checker sees pictures, not previews: where it is enforced, none leaves.
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
                # Before the next look at anything: what rings after it is heard by the next wait.
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
        """Seconds; None while nobody has asked to stop."""
        return None if self._stop_at is None else max(0.0, self._stop_at - time.monotonic())

    def _report_loading(self, endpoint: str, loading: LoadProgress) -> None:
        """Tell the log, /health/ready, and those who wait for it."""
        self.loading = loading
        unit, name = (1e9, "GB") if loading.total_bytes >= 1e9 else (1e6, "MB")
        done, total = loading.loaded_bytes / unit, loading.total_bytes / unit
        message = f"loading {loading.component}, {done:.1f} of {total:.1f} {name} are here"
        log.info("%s: %s", endpoint, message, extra={"loading": loading})
        for job in self._pending.jobs:
            self._queue.log(job, f"{endpoint}: {message}")

    def fail(self, error: BaseException) -> None:
        """The server cannot go on, for this reason. Called from any thread, and the first reason counts."""
        if self.failure is not None:
            return
        # What an operator can mend is said in a line; for the rest the trace is wanted.
        log.error(
            "the worker stopped: %s", error, exc_info=None if isinstance(error, OSError | CorruptDatabase) else error
        )
        self.failure = error
        self._notifier.work_available.set()
        self._notifier.notify(WORKER)

    def _on_step_timeout(self, jobs: Sequence[Job]) -> None:
        try:
            self._queue.record_crash(jobs)
        finally:
            # Also when the disk is full.
            abort_process(self._settings.step_deadline, jobs)


def _preview(running: RunningJob) -> str | None:
    """A small JPEG as a data URI; without one the picture itself is none the worse."""
    try:
        image = running.engine.preview(running.task)
    except Exception:
        about = {"request_id": running.job.request_id}
        log.exception("there is no preview of step %d", running.task.step, extra=about)
        return None
    if image is None:
        return None
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
