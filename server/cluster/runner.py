"""One GPU away from the head: the same worker as in the server's own process, with a desk in the place of its queue."""

import contextlib
import logging
import logging.handlers
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from models import discover
from models.loading import specs
from server.cluster.messages import JobRejected, LogRecord, Message, RunnerState, RunnerStopped
from server.cluster.runner_queue import RunnerMetrics, RunnerQueue
from server.inputs.cache import InputCache
from server.library_env import disable_telemetry_and_warnings, limit_openmp_spinning
from server.queue.jobs import Job
from server.queue.notifier import Notifier
from server.settings import Settings
from server.worker.crash_recorder import CrashRecorder
from server.worker.engine_pool import engine_configs
from server.worker.worker import Worker

log = logging.getLogger(__name__)

#: Seconds between two looks at the worker: while it loads, and when it paints.
STATE_INTERVALS = (0.1, 2.0)
#: Seconds that the folder of a runner that died stays, so that the head can read its black box.
KEEP_SECONDS = 60.0


def node_directory() -> Path:
    """What a node keeps from one runner to the next: what was compiled, and a folder for each that lives."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "flux-server"


class Runner:
    """Made, called and ended by the head. Knows nothing of Ray, so that it can be tried without."""

    def __init__(self, settings: Settings) -> None:
        disable_telemetry_and_warnings()
        limit_openmp_spinning()
        # One thread, says Ray to those that ask for no CPU; the worker in a server's own process takes what there is.
        os.environ.pop("OMP_NUM_THREADS", None)
        self._directory = _new_directory(node_directory() / "runners")
        settings = settings.model_copy(update={"data_dir": node_directory()})
        self._queue, self._notifier = RunnerQueue(), _FailureNotifier(self._fail)
        kept = int(settings.loras_gb * 1e9)
        self._inputs = InputCache(self._directory / "inputs", lambda: self._queue.input_names, kept)
        known = discover(settings.models_dir)
        weights_by_endpoint = specs.assign_weights(settings.weights, known)
        self._crash_recorder = CrashRecorder(self._directory)
        self._worker = Worker(
            settings,
            {endpoint: known[endpoint] for endpoint in weights_by_endpoint},
            engine_configs(settings, weights_by_endpoint),
            self._queue,
            self._queue,
            self._inputs.path,
            self._notifier,
            RunnerMetrics(self._queue),
            self._crash_recorder,
        )
        self._is_stopping = threading.Event()
        logging.basicConfig(level=settings.log_level.upper(), handlers=[_Handler(self._queue)], force=True)

    def about(self) -> Mapping[str, Any]:
        """Its process, and the folder with its black box."""
        return {"pid": os.getpid(), "folder": str(self._directory)}

    def work(self) -> Iterator[Sequence[Message]]:
        """Load, then paint what is put in; yields what there is to report until it is over."""
        self._crash_recorder.open()
        self._worker.start()
        threading.Thread(target=self._report_state, name="look", daemon=True).start()
        is_over = False
        while not is_over:
            messages = self._queue.messages()
            yield messages
            is_over = any(isinstance(message, RunnerStopped) for message in messages)

    def take_job(self, job: Job, text: str, contents: Mapping[str, Any]) -> None:
        """One more job, and where to get the files that came along with it."""
        try:
            for name, source in contents.items():
                temp_path = self._inputs.temp_path()
                temp_path.write_bytes(self.fetch(source))
                self._inputs.add(temp_path, Path(name).suffix)
        except Exception:
            log.exception("what came along could not be taken in", extra={"request_id": job.request_id})
            self._queue.send(JobRejected(job.request_id))
            return
        self._queue.enqueue(job, text)
        self._notifier.work_available.set()

    def missing_inputs(self, names: Sequence[str]) -> Sequence[str]:
        """Which of these files are not here; the others stay for a while."""
        return [name for name in names if not self._inputs.touch(name)]

    def fetch(self, source: Any) -> bytes:
        """What is in a file that a job brought along; `source` is what the head gave for it."""
        return bytes(source)

    def cancel(self, request_id: str) -> None:
        """A job is to end before its next step."""
        if job := self._queue.find(request_id):
            job.is_cancelled = True
            self._notifier.work_available.set()

    def preview(self, request_id: str) -> None:
        """Somebody wants to see a job's previews."""
        if job := self._queue.find(request_id):
            job.wants_previews = True

    def ack_crash(self) -> None:
        """What was to be remembered before the process ends, is."""
        self._queue.ack_crash()

    def stop(self) -> None:
        """Finish what runs within the grace, give the rest back."""
        self._is_stopping.set()
        self._worker.stop()
        self._queue.send(RunnerStopped())

    def _report_state(self) -> None:
        """Tell how it is, for as long as it is."""
        last: RunnerState | None = None
        swept_at = time.monotonic()
        while not self._is_stopping.wait(STATE_INTERVALS[self._worker.is_ready]):
            state = RunnerState(self._worker.loading, self._worker.is_ready, self._worker.gpus()[0].engines)
            if state != last:
                self._queue.send(state)
                last = state
            if time.monotonic() > swept_at + KEEP_SECONDS:
                self._inputs.sweep()
                swept_at = time.monotonic()

    def _fail(self) -> None:
        failure = self._worker.failure
        self._queue.send(RunnerStopped(str(failure) or repr(failure)))


class _FailureNotifier(Notifier):
    """Rung by the worker for one thing only: that it ended by itself."""

    def __init__(self, on_failure: Any) -> None:
        super().__init__()
        self._on_failure = on_failure

    def notify(self, *topics: str) -> None:
        """Somebody has to know."""
        self._on_failure()


class _Handler(logging.handlers.QueueHandler):
    """What is logged here is said by the head."""

    def __init__(self, queue: RunnerQueue) -> None:
        # No queue: records go to the desk.
        super().__init__(None)  # type: ignore[arg-type]
        self.setFormatter(logging.Formatter("%(message)s"))
        self._queue = queue

    def enqueue(self, record: logging.LogRecord) -> None:
        """Ready to be sent: without what was put into it on the way here, which the head would show."""
        for name in ("message", "_ray_timestamp_ns"):
            record.__dict__.pop(name, None)
        self._queue.send(LogRecord(record))


def _new_directory(runners: Path) -> Path:
    """A folder for this process; those of runners that died a while ago are deleted."""
    runners.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Of this machine alone: homes may be shared.
    here = f"{socket.gethostname()}-"
    for directory in runners.glob(f"{here}*"):
        with contextlib.suppress(OSError, ValueError):
            is_old = directory.stat().st_mtime < time.time() - KEEP_SECONDS
            if is_old and not psutil.pid_exists(int(directory.name.removeprefix(here))):
                shutil.rmtree(directory, ignore_errors=True)
    mine = runners / f"{here}{os.getpid()}"
    shutil.rmtree(mine, ignore_errors=True)
    mine.mkdir(mode=0o700)
    return mine
