"""The head of a Ray cluster: jobs run on one Ray actor per GPU; the queue, the HTTP API and the files stay here."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence

from models.base import LoadProgress
from server.cluster.gpu_slot import GpuSlot
from server.cluster.ray_backend import RayCluster, RayLost
from server.cluster.router import CacheAffinity, Router
from server.errors import DiskFull
from server.metrics import Metrics
from server.queue.jobs import Job
from server.queue.notifier import WORKER, Notifier
from server.queue.queue import Queue
from server.settings import Settings
from server.status import GpuStatus
from server.storage.database import CorruptDatabase
from server.storage.file_store import FileStore

log = logging.getLogger(__name__)

#: Maximum jobs of one priority per GPU at a time. The limit is low, so that a GPU that joins later finds work. With
#: --max-gpus, the head requests one GPU for each group of this many jobs.
MAX_JOBS_PER_GPU = 4
#: Seconds after which an idle GPU is released, while there are more GPUs than needed.
IDLE_SECONDS = 60.0
#: Seconds between two checks of how many GPUs are needed.
POLL_INTERVAL = 1.0


class ClusterHead:
    """The cluster's counterpart of a worker: claims jobs and assigns each to the best GPU slot."""

    def __init__(
        self,
        settings: Settings,
        queue: Queue,
        files: FileStore,
        ray_cluster: RayCluster,
        notifier: Notifier,
        metrics: Metrics,
    ) -> None:
        self._settings, self._queue, self._files = settings, queue, files
        self._notifier, self._metrics = notifier, metrics
        self._ray = ray_cluster
        self._slots: list[GpuSlot] = []
        self._num_slots = 0
        #: The last time, on the monotonic clock, when there were no more slots than needed.
        self._all_wanted_at = -math.inf
        self._router = Router[GpuSlot](min(settings.max_running, MAX_JOBS_PER_GPU))
        #: Slots whose runner or jobs changed, to be updated in the router.
        self._changed: deque[GpuSlot] = deque()
        self._is_stopping = False
        #: The error that stopped the head; None if there was none.
        self.failure: BaseException | None = None
        self._failure_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="cluster-head", daemon=True)

    @property
    def is_ready(self) -> bool:
        """Whether at least one GPU is ready."""
        return not self._is_stopping and any(slot.is_ready for slot in list(self._slots))

    @property
    def loading(self) -> LoadProgress:
        """The progress of the runner that has loaded the most bytes."""
        progress = [slot.loading for slot in list(self._slots)]
        return max(progress, key=lambda loading: loading.loaded_bytes, default=LoadProgress())

    def gpus(self) -> Sequence[GpuStatus]:
        """Return the status of each GPU slot."""
        return [slot.gpu() for slot in list(self._slots)]

    def cancel(self, job: Job) -> None:
        """Have a job's runner cancel the job before its next step; return when it confirms, or after a timeout."""
        for slot in [slot for slot in list(self._slots) if job.request_id in slot.jobs]:
            slot.cancel(job)

    def start(self) -> None:
        """Connect to Ray and start to request GPUs. Raises RuntimeError if Ray is missing or cannot be reached."""
        self._ray.connect()
        self._thread.start()

    def stop(self) -> None:
        """Stop claiming, finish running jobs within the grace period, requeue the rest, then return."""
        if self._is_stopping:
            return
        self._is_stopping = True
        until = time.monotonic() + self._settings.shutdown_grace + 5
        self._notifier.work_available.set()
        self._thread.join(10)
        for act in (GpuSlot.close, lambda slot: slot.join(until), GpuSlot.kill, lambda slot: slot.join(until + 5)):
            for slot in self._slots:
                act(slot)
        self._ray.close()

    # -- the head's thread

    def _run(self) -> None:
        scaled_at = -math.inf
        while not self._is_stopping and self.failure is None:
            now = time.monotonic()
            try:
                if now >= scaled_at + POLL_INTERVAL:
                    scaled_at = now
                    self._scale()
                while self._dispatch():
                    continue
            except DiskFull as error:
                log.error("the head cannot claim jobs: %s. No job is lost; retrying every second", error)
            except RayLost as error:
                self.fail(error)
                return
            except Exception:
                log.exception("requesting GPUs or assigning a job failed; retrying in a second")
            self._notifier.work_available.wait(POLL_INTERVAL)
            self._notifier.work_available.clear()

    def _dispatch(self) -> bool:
        """Claim and assign one job; return False when no GPU has room or no job waits. Raises DiskFull."""
        while self._changed:
            slot = self._changed.popleft()
            if not slot.is_stopped:
                self._router.update(slot)
        if not self._router.has_room:
            return False
        claimed = self._queue.claim(
            include_low_priority=self._router.accepts_low_priority, slots=self._router.num_slots
        )
        if claimed is None:
            return False
        job, text = claimed
        slot = self._router.route(job, CacheAffinity.of(text))
        slot.assign(job, text)
        self._router.update(slot)
        return True

    def _on_slot_changed(self, slot: GpuSlot) -> None:
        """Schedule the router's update of a slot whose runner or jobs changed. May be called from any thread."""
        self._changed.append(slot)
        self._notifier.work_available.set()

    def fail(self, error: BaseException) -> None:
        """Stop the head because of `error`; do nothing after an earlier error. May be called from any thread.

        The server then exits, and the next process resumes the queue.
        """
        with self._failure_lock:
            if self.failure is not None:
                return
            self.failure = error
        explains_itself = isinstance(error, RayLost | CorruptDatabase)
        log.error(
            "the cluster head stopped, so the server exits with code 1: %s",
            error,
            exc_info=None if explains_itself else error,
        )
        self._notifier.notify(WORKER)

    # -- scaling

    def _scale(self) -> None:
        """Request GPUs if more are needed; release idle ones if fewer are needed."""
        for slot in [slot for slot in self._slots if slot.is_stopped]:
            self._slots.remove(slot)
            self._router.remove(slot)
        staying = [slot for slot in self._slots if not slot.is_closing]
        wanted = self._num_wanted()
        for _ in range(wanted - len(staying)):
            slot = GpuSlot(
                self._num_slots,
                self._ray.start_runner,
                self._queue,
                self._files,
                self._metrics,
                self._on_slot_changed,
                self.fail,
            )
            self._num_slots += 1
            self._slots.append(slot)
            slot.start()
        if len(staying) <= wanted:
            self._all_wanted_at = time.monotonic()
        # Release slots without a GPU first, then loading ones, then the newest. A slot with jobs is never released.
        spare = sorted(filter(self._is_idle, staying), key=lambda slot: (slot.has_gpu, slot.is_ready, -slot.number))
        for slot in spare[: max(0, len(staying) - wanted)]:
            log.info("GPU %d is not needed; releasing it", slot.number)
            slot.close()

    def _is_idle(self, slot: GpuSlot) -> bool:
        """Return whether a surplus slot may be released: it has no jobs, and has no GPU or was idle for IDLE_SECONDS.

        A slot that loads weights gets the same time. Otherwise, a queue whose length fluctuates would never get its
        weights loaded.
        """
        is_overdue = time.monotonic() > max(slot.idle_since, self._all_wanted_at) + IDLE_SECONDS
        return not slot.jobs and (is_overdue or not slot.has_gpu)

    def _num_wanted(self) -> int:
        settings, num_gpus = self._settings, self._ray.num_gpus()
        if settings.gpus:
            return settings.gpus
        if not settings.max_gpus:
            # Use all GPUs, and request at least one: nodes may join later.
            return max(1, settings.min_gpus, num_gpus)
        num_jobs = self._queue.length + sum(len(slot.jobs) for slot in self._slots)
        return min(settings.max_gpus, max(settings.min_gpus, math.ceil(num_jobs / MAX_JOBS_PER_GPU)))
