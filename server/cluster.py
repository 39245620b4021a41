"""The same work on Ray actors, one per GPU, on any number of machines. The queue, routes and files stay at the head."""

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from models.base import Loading
from server.errors import DiskFull
from server.files import Files
from server.gpu import Gpu
from server.inputs import Inputs
from server.jobs import Job
from server.metrics import Metrics
from server.notifier import Notifier
from server.queue import Queue
from server.ray_runner import Link, connect
from server.seat import Seat
from server.settings import Settings

log = logging.getLogger(__name__)

#: With --max-gpus: one GPU for so many requests that wait or run.
JOBS_A_GPU = 4
#: A GPU that is not wanted any more is let go after so many idle seconds.
IDLE_SECONDS = 60.0
#: Seconds between two looks at how many GPUs there should be.
LOOK_EVERY = 1.0
#: Runner hints that are remembered.
HINTS = 10_000


class Cluster:
    """What a worker is to one GPU: claims jobs, and gives each to the seat that serves it best."""

    def __init__(
        self, settings: Settings, queue: Queue, files: Files, inputs: Inputs, notifier: Notifier, metrics: Metrics
    ) -> None:
        self._settings, self._queue, self._files = settings, queue, files
        self._notifier, self._metrics = notifier, metrics
        self._ray: Any = None
        self._link = partial(Link, settings, inputs.brought.path)
        self._seats: list[Seat] = []
        self._num_seats = 0
        self._hints: OrderedDict[str, Seat] = OrderedDict()
        self._is_stopping = False
        #: Why it ended by itself, if it did.
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cluster", daemon=True)

    @property
    def is_ready(self) -> bool:
        """Whether one GPU can paint, at least."""
        return not self._is_stopping and any(seat.is_ready for seat in self._seats)

    @property
    def loading(self) -> Loading:
        """How far the one is that has come furthest."""
        return max((seat.loading for seat in self._seats), key=lambda loading: loading.loaded_bytes, default=Loading())

    def gpus(self) -> Sequence[Gpu]:
        """What an operator is told of each."""
        return [seat.gpu() for seat in list(self._seats)]

    def start(self) -> None:
        """Connect to Ray, and ask it for GPUs. Raises RuntimeError."""
        self._ray = connect(self._settings.ray, self._settings.gpus or 1)
        self._thread.start()

    def stop(self) -> None:
        """Claim nothing more; what runs is finished within the grace, the rest goes back; then return."""
        if self._is_stopping:
            return
        self._is_stopping = True
        until = time.monotonic() + self._settings.shutdown_grace + 5
        self._notifier.work.set()
        self._thread.join(10)
        for seat in self._seats:
            seat.close()
        for seat in self._seats:
            seat.end(until - time.monotonic())
        self._ray.shutdown()

    # -- its thread

    def _run(self) -> None:
        looked_at = -math.inf
        while not self._is_stopping:
            try:
                if time.monotonic() >= looked_at + LOOK_EVERY:
                    self._scale()
                    looked_at = time.monotonic()
                for seat in self._seats:
                    seat.pass_on()
                while self._hand_out():
                    continue
            except DiskFull:
                log.error("the disk is full; nothing is lost, trying again every second")
            except Exception:
                log.exception("the cluster could not be looked after; trying again")
            self._notifier.work.wait(LOOK_EVERY)
            self._notifier.work.clear()

    def _hand_out(self) -> bool:
        """Claim one job for a GPU that has room; False when there is none of either. Raises DiskFull."""
        limit = self._settings.max_running
        for_low = [seat for seat in self._seats if seat.has_room(limit, for_low=True)]
        free = for_low or [seat for seat in self._seats if seat.has_room(limit, for_low=False)]
        claimed = self._queue.claim(takes_low=bool(for_low)) if free else None
        if claimed is None:
            return False
        job, text = claimed
        self._best(free, job, text).give(job, text)
        return True

    def _best(self, free: Sequence[Seat], job: Job, text: str) -> Seat:
        """The one that is hinted at; else of those with least to do, the one that has most of it at hand."""
        chosen: Seat = min(free, key=lambda seat: (len(seat.jobs), -seat.fit(text), seat.number))
        hinted = self._hints.get(job.runner_hint or "")
        if hinted and hinted in free:
            chosen = hinted
        if job.runner_hint:
            self._hints[job.runner_hint] = chosen
            self._hints.move_to_end(job.runner_hint)
            if len(self._hints) > HINTS:
                self._hints.popitem(last=False)
        return chosen

    # -- how many GPUs

    def _scale(self) -> None:
        """Ask for GPUs that are wanted, and let those go that are not: the last ones first."""
        self._seats = [seat for seat in self._seats if not seat.is_over]
        staying = [seat for seat in self._seats if not seat.is_closing]
        wanted = self._num_wanted()
        for _ in range(wanted - len(staying)):
            seat = Seat(self._num_seats, self._link, self._queue, self._files, self._metrics, self._notifier.work.set)
            self._num_seats += 1
            self._seats.append(seat)
            seat.start()
        # Those first that have no GPU yet, then those that came last.
        for seat in sorted(staying, key=lambda seat: (seat.is_ready, -seat.number))[: max(0, len(staying) - wanted)]:
            if not seat.is_ready or (not seat.jobs and time.monotonic() > seat.idle_since + IDLE_SECONDS):
                log.info("GPU %d is let go", seat.number)
                seat.close()

    def _num_wanted(self) -> int:
        settings = self._settings
        if settings.gpus:
            return settings.gpus
        if not settings.max_gpus:
            # As many as there are, and at least one is asked for: nodes may come later.
            return max(1, settings.min_gpus, int(self._ray.cluster_resources().get("GPU", 0)))
        num_jobs = self._queue.length + sum(len(seat.jobs) for seat in self._seats)
        return min(settings.max_gpus, max(settings.min_gpus, math.ceil(num_jobs / JOBS_A_GPU)))
