"""The same work on Ray actors, one per GPU, on any number of machines. The queue, routes and files stay at the head."""

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

#: What one GPU is given at a time, at most, so that one that joins finds work; with --max-gpus, what one is asked for.
MAX_JOBS_PER_GPU = 4
#: A GPU that has nothing to do is let go after so many seconds with more of them than are wanted.
IDLE_SECONDS = 60.0
#: Seconds between two looks at how many GPUs there should be.
POLL_INTERVAL = 1.0


class ClusterHead:
    """What a worker is to one GPU: claims jobs, and gives each to the seat that serves it best."""

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
        #: When there were last no more of them than are wanted.
        self._all_wanted_at = -math.inf
        self._router = Router[GpuSlot](min(settings.max_running, MAX_JOBS_PER_GPU))
        #: Seats whose runner or jobs changed, until the board knows.
        self._changed: deque[GpuSlot] = deque()
        self._is_stopping = False
        #: Why it ended by itself, if it did.
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cluster", daemon=True)

    @property
    def is_ready(self) -> bool:
        """Whether one GPU can paint, at least."""
        return not self._is_stopping and any(slot.is_ready for slot in list(self._slots))

    @property
    def loading(self) -> LoadProgress:
        """How far the one is that has come furthest."""
        all_of_them = [slot.loading for slot in list(self._slots)]
        return max(all_of_them, key=lambda loading: loading.loaded_bytes, default=LoadProgress())

    def gpus(self) -> Sequence[GpuStatus]:
        """What an operator is told of each."""
        return [slot.gpu() for slot in list(self._slots)]

    def cancel(self, job: Job) -> None:
        """A job is to end before its next step; returns when its runner knows, or is gone."""
        for slot in [slot for slot in list(self._slots) if job.request_id in slot.jobs]:
            slot.cancel(job)

    def start(self) -> None:
        """Ask for GPUs. Raises RuntimeError where there is nobody to ask."""
        self._ray.connect()
        self._thread.start()

    def stop(self) -> None:
        """Claim nothing more; what runs is finished within the grace, the rest goes back; then return."""
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

    # -- its thread

    def _run(self) -> None:
        looked_at = -math.inf
        while not self._is_stopping and self.failure is None:
            now = time.monotonic()
            try:
                if now >= looked_at + POLL_INTERVAL:
                    looked_at = now
                    self._scale()
                while self._dispatch():
                    continue
            except DiskFull as error:
                log.error("%s; nothing is lost, trying again every second", error)
            except RayLost as error:
                self.fail(error)
                return
            except Exception:
                log.exception("the cluster could not be looked after; trying again")
            self._notifier.work_available.wait(POLL_INTERVAL)
            self._notifier.work_available.clear()

    def _dispatch(self) -> bool:
        """Claim one job for a GPU that has room; False when there is none of either. Raises DiskFull."""
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
        """A seat's runner or jobs changed; called from the seat's thread."""
        self._changed.append(slot)
        self._notifier.work_available.set()

    def fail(self, error: BaseException) -> None:
        """The head cannot go on: another process starts with what is in the queue. Called from any thread."""
        if self.failure is not None:
            return
        is_told = isinstance(error, RayLost | CorruptDatabase)
        log.error("the cluster is given up: %s", error, exc_info=None if is_told else error)
        self.failure = error
        self._notifier.notify(WORKER)

    # -- how many GPUs

    def _scale(self) -> None:
        """Ask for GPUs that are wanted, and let those go that are not: the last ones first."""
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
        # Those first that have no GPU yet, then those that came last; one that has work never.
        spare = sorted(filter(self._is_idle, staying), key=lambda slot: (slot.has_gpu, slot.is_ready, -slot.number))
        for slot in spare[: max(0, len(staying) - wanted)]:
            log.info("GPU %d is let go", slot.number)
            slot.close()

    def _is_idle(self, slot: GpuSlot) -> bool:
        """Whether it may be let go where there are too many. One that loads is kept as long as one that idles.

        Otherwise a queue that is now a little shorter, now a little longer would never see its weights loaded.
        """
        is_long = time.monotonic() > max(slot.idle_since, self._all_wanted_at) + IDLE_SECONDS
        return not slot.jobs and (is_long or not slot.has_gpu)

    def _num_wanted(self) -> int:
        settings, num_gpus = self._settings, self._ray.num_gpus()
        if settings.gpus:
            return settings.gpus
        if not settings.max_gpus:
            # As many as there are, and at least one is asked for: nodes may come later.
            return max(1, settings.min_gpus, num_gpus)
        num_jobs = self._queue.length + sum(len(slot.jobs) for slot in self._slots)
        return min(settings.max_gpus, max(settings.min_gpus, math.ceil(num_jobs / MAX_JOBS_PER_GPU)))
