"""The process on one GPU of a cluster: the same worker as on a single GPU, with a runner queue as its job source."""

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
from server.library_env import allow_kernels, disable_telemetry_and_warnings, set_pytorch_variables
from server.queue.jobs import Job
from server.queue.notifier import Notifier
from server.settings import Settings
from server.worker.crash_recorder import CrashRecorder
from server.worker.engine_pool import engine_configs
from server.worker.worker import Worker

log = logging.getLogger(__name__)

#: Seconds between two checks whether the worker's state changed: while it loads, and once it is ready.
STATE_INTERVALS = (0.1, 2.0)
#: Seconds that a dead runner's directory is kept after its last change, so that the head can read the crash record;
#: also the seconds between two sweeps of the input cache.
KEEP_SECONDS = 60.0


def node_directory() -> Path:
    """Return the node's directory, which outlives runners. It holds compiled code, and a directory for each runner."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "flux-server"


class Runner:
    """A runner, which the head creates, calls and ends. This class does not depend on Ray, so tests use it alone."""

    def __init__(self, settings: Settings) -> None:
        disable_telemetry_and_warnings()
        set_pytorch_variables()
        allow_kernels(settings.kernels_allow)
        # Ray sets this variable to 1 for actors that request no CPU. Without the variable, PyTorch uses all cores.
        os.environ.pop("OMP_NUM_THREADS", None)
        self._directory = _new_directory(node_directory() / "runners")
        settings = settings.model_copy(update={"data_dir": node_directory()})
        self._queue, self._notifier = RunnerQueue(), _FailureNotifier(self._fail)
        max_input_bytes = int(settings.loras_gb * 1e9)
        self._inputs = InputCache(self._directory / "inputs", lambda: self._queue.input_names, max_input_bytes)
        models = discover(settings.models_dir)
        weights_by_endpoint = specs.assign_weights(settings.weights, models, settings.base)
        self._crash_recorder = CrashRecorder(self._directory)
        self._worker = Worker(
            settings,
            {endpoint: models[endpoint] for endpoint in weights_by_endpoint},
            engine_configs(settings, weights_by_endpoint, models),
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
        """Return the process id, and the directory with the crash record."""
        return {"pid": os.getpid(), "directory": str(self._directory)}

    def work(self) -> Iterator[Sequence[Message]]:
        """Load the weights and run jobs, on other threads; yield batches of messages until the runner stops."""
        self._crash_recorder.open()
        self._worker.start()
        threading.Thread(target=self._report_state, name="report-state", daemon=True).start()
        is_over = False
        while not is_over:
            messages = self._queue.messages()
            yield messages
            is_over = any(isinstance(message, RunnerStopped) for message in messages)

    def take_job(self, job: Job, text: str, contents: Mapping[str, Any]) -> None:
        """Store the input files that were missing here, then enqueue the job; its input is `text`.

        `contents` maps the name of each file to the argument that `fetch` takes. If a file cannot be stored, send
        JobRejected instead.
        """
        try:
            for name, source in contents.items():
                temp_path = self._inputs.temp_path()
                temp_path.write_bytes(self.fetch(source))
                self._inputs.add(temp_path, Path(name).suffix)
        except Exception:
            extra = {"request_id": job.request_id}
            log.exception(
                "the input files of a request could not be stored; the head replaces this runner", extra=extra
            )
            self._queue.send(JobRejected(job.request_id))
            return
        self._queue.enqueue(job, text)
        self._notifier.work_available.set()

    def missing_inputs(self, names: Sequence[str]) -> Sequence[str]:
        """Return the names of the files that are not cached here; the cache keeps the other files for a while."""
        return [name for name in names if not self._inputs.touch(name)]

    def fetch(self, source: Any) -> bytes:
        """Return the content of an input file, which the head passes as `source`."""
        return bytes(source)

    def cancel(self, request_id: str) -> None:
        """Cancel a job if it is still here; the job ends before its next step."""
        if job := self._queue.find(request_id):
            job.is_cancelled = True
            self._notifier.work_available.set()

    def preview(self, request_id: str) -> None:
        """Turn on previews for a job, if it is still here."""
        if job := self._queue.find(request_id):
            job.wants_previews = True

    def ack_crash(self) -> None:
        """Confirm that the head recorded the crash, so that the process can exit."""
        self._queue.ack_crash()

    def stop(self) -> None:
        """Finish running jobs within the grace period, release the rest, and send RunnerStopped."""
        self._is_stopping.set()
        self._worker.stop()
        self._queue.send(RunnerStopped())

    def _report_state(self) -> None:
        """Report the worker's state when it changes, and sweep the input cache, until `stop`."""
        last_state: RunnerState | None = None
        swept_at = time.monotonic()
        while not self._is_stopping.wait(STATE_INTERVALS[self._worker.is_ready]):
            state = RunnerState(self._worker.loading, self._worker.is_ready, self._worker.gpus()[0].engines)
            if state != last_state:
                self._queue.send(state)
                last_state = state
            if time.monotonic() > swept_at + KEEP_SECONDS:
                self._inputs.sweep()
                swept_at = time.monotonic()

    def _fail(self) -> None:
        failure = self._worker.failure
        self._queue.send(RunnerStopped(str(failure) or repr(failure)))


class _FailureNotifier(Notifier):
    """The worker's notifier. On a runner, the only call of `notify` comes from a worker that fails."""

    def __init__(self, on_failure: Any) -> None:
        super().__init__()
        self._on_failure = on_failure

    def notify(self, *topics: str) -> None:
        """Report the failure to the head, whatever the topic."""
        self._on_failure()


class _Handler(logging.handlers.QueueHandler):
    """A handler that sends log records to the head."""

    def __init__(self, queue: RunnerQueue) -> None:
        # No standard queue, because records go to the runner queue.
        super().__init__(None)  # type: ignore[arg-type]
        self.setFormatter(logging.Formatter("%(message)s"))
        self._queue = queue

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send a record without the attributes that logging and Ray added, which the head would print."""
        for name in ("message", "_ray_timestamp_ns"):
            record.__dict__.pop(name, None)
        self._queue.send(LogRecord(record))


def _new_directory(runners: Path) -> Path:
    """Create this process's directory and return its path.

    Deletes the directories of dead runners that did not change for KEEP_SECONDS.
    """
    runners.mkdir(parents=True, exist_ok=True, mode=0o700)
    # The host name comes first, because machines may share a home directory.
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
