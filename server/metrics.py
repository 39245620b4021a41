"""Prometheus counters, histograms and gauges, with names and units that follow Prometheus' conventions."""

import itertools
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from models.base import EngineInfo
from models.image_size import PRESETS
from server.status import GpuStatus
from server.storage.database import Database

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: A gauge's description and current value.
Gauge = tuple[str, float]
#: The values of one gauge, by the names of the GPU and its node.
GpuValues = Mapping[tuple[str, str], float]
_PREFIX = "flux_server_"
#: Upper bounds of the histograms' buckets, in seconds.
_STEPS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WAITS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600)
#: Reads when the oldest waiting request was submitted. The parameter is 1 for low priority and 0 for normal priority.
_FIRST = "SELECT submitted_at FROM jobs WHERE state = 'IN_QUEUE' AND (priority = 'low') = ? ORDER BY sequence LIMIT 1"


class Metrics:
    """The metrics of one server. Other components increment the counters, from any thread."""

    def __init__(self, endpoints: Iterable[str] = ()) -> None:
        """Create the metrics. Counts of ended requests begin at 0 for `endpoints`.

        Without these zeros, an alarm on an increase would miss the first ended request.
        """
        self.registry = CollectorRegistry()
        self.gauges: Callable[[], Mapping[str, Gauge]] = dict
        self.http_requests = self._counter("http_requests", "HTTP responses sent.", "method", "route", "status")
        self.submitted = self._counter("requests_submitted", "Requests accepted.", "endpoint")
        self.ended = self._counter("requests_ended", "Requests that finished.", "endpoint", "outcome")
        for endpoint, outcome in itertools.product(endpoints, ("completed", "failed", "cancelled")):
            self.ended.labels(endpoint, outcome)
        self.retried = self._counter("requests_retried", "Starts of requests that had started before.", "endpoint")
        self.images = self._counter("images", "Images generated.", "endpoint")
        self.flagged = self._counter("images_flagged", "Images blacked out after the safety check.", "endpoint")
        self.webhooks = self._counter("webhook_attempts", "Attempts to deliver a webhook.", "outcome")
        self.wait = self._histogram(
            "queue_wait_seconds", "Seconds from the submit to the first start.", _WAITS, "endpoint"
        )
        self.step = self._histogram(
            "step_seconds", "Seconds for one forward pass, batched or not.", _STEPS, "size", "acceleration"
        )

    def observe_step(self, size: tuple[int, int], acceleration: str, seconds: float) -> None:
        """Record one forward pass. Sizes without a preset share one label, so that clients cannot fill the memory."""
        name = f"{size[0]}x{size[1]}" if size in PRESETS.values() else "other"
        self.step.labels(name, acceleration).observe(seconds)

    def count_images(self, endpoint: str, num_images: int, num_flagged: int) -> None:
        """Count the images of one request, and those blacked out after the safety check."""
        self.images.labels(endpoint).inc(num_images)
        self.flagged.labels(endpoint).inc(num_flagged)

    def steps(self) -> list[dict[str, Any]]:
        """Return the number and the mean seconds of forward passes since the start, by size and acceleration."""
        totals: dict[tuple[str, str], dict[str, float]] = {}
        for sample in (sample for metric in self.step.collect() for sample in metric.samples):
            kind = sample.name.rpartition("_")[2]
            if kind in ("sum", "count"):
                totals.setdefault((sample.labels["size"], sample.labels["acceleration"]), {})[kind] = sample.value
        return [
            {"size": size, "acceleration": tier, "count": int(total["count"]), "seconds": total["sum"] / total["count"]}
            for (size, tier), total in totals.items()
        ]

    def observe_start(self, endpoint: str, attempt: int, waited: float) -> None:
        """Record that a request was claimed `waited` seconds after its submit. Later attempts count as retries only."""
        if attempt > 1:
            self.retried.labels(endpoint).inc()
        else:
            self.wait.labels(endpoint).observe(max(0.0, waited))

    def count_end(self, endpoint: str, status: int, *, is_cancelled: bool) -> None:
        """Count a request that finished."""
        outcome = "cancelled" if is_cancelled else "completed" if status == 200 else "failed"
        self.ended.labels(endpoint, outcome).inc()

    def add_gauges(
        self, gauges: Callable[[], Mapping[str, Gauge]], by_gpu: Callable[[], Mapping[str, tuple[str, GpuValues]]]
    ) -> None:
        """Register two functions that are called whenever metrics are read.

        `gauges` returns the gauges of the server, `by_gpu` those of each GPU.
        """
        self.gauges = gauges
        self.registry.register(_Gauges(gauges, by_gpu))

    def text(self) -> bytes:
        """Render all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}{name}", description, labels, registry=self.registry)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"{_PREFIX}{name}", description, labels, registry=self.registry, buckets=buckets)


class _Gauges(Collector):
    def __init__(
        self, read: Callable[[], Mapping[str, Gauge]], by_gpu: Callable[[], Mapping[str, tuple[str, GpuValues]]]
    ) -> None:
        self._read, self._by_gpu = read, by_gpu

    def collect(self) -> list[Metric]:
        """Return the current values."""
        families = [
            GaugeMetricFamily(f"{_PREFIX}{name}", description, value)
            for name, (description, value) in self._read().items()
        ]
        for name, (description, values) in self._by_gpu().items():
            family = GaugeMetricFamily(f"{_PREFIX}{name}", description, labels=("gpu", "node"))
            for labels, value in values.items():
                family.add_metric(labels, value)
            families.append(family)
        return list(families)


def collect_gauges(
    database: Database, data_dir: Path, is_ready: Callable[[], bool], gpus: Callable[[], Sequence[GpuStatus]]
) -> Mapping[str, Gauge]:
    """Return each gauge's description and value; blocks on the disk."""
    disk = shutil.disk_usage(data_dir)
    (due,) = database.read("SELECT count(*) AS number FROM deliveries WHERE due_at IS NOT NULL")
    # The first request of each priority; either may have waited longest.
    firsts = [database.read(_FIRST, is_low) for is_low in (False, True)]
    (waiting,) = database.read("SELECT count(*) AS number FROM jobs WHERE state = 'IN_QUEUE'")
    (running,) = database.read("SELECT count(*) AS number FROM jobs WHERE state = 'IN_PROGRESS'")
    oldest = max((max(0.0, time.time() - row["submitted_at"]) for rows in firsts for row in rows), default=0.0)
    (stored,) = database.read("SELECT coalesce(sum(size), 0) AS size FROM files")
    return {
        "ready": ("Whether the models can generate images.", float(is_ready())),
        "queue_length": ("Waiting requests.", float(waiting["number"])),
        "queue_oldest_seconds": ("Seconds that the oldest waiting request has waited.", oldest),
        "requests_running": ("Running requests.", float(running["number"])),
        "webhooks_due": ("Webhooks waiting for delivery, including retries.", float(due["number"])),
        "files_bytes": ("Size of stored images and uploads.", float(stored["size"])),
        "disk_free_bytes": ("Free space on the disk of the data directory.", float(disk.free)),
        "memory_resident_bytes": ("Resident memory of this process.", float(psutil.Process().memory_info().rss)),
        "engines_loaded": ("Sets of weights in memory, on all GPUs.", float(sum(len(gpu.engines) for gpu in gpus()))),
    }


def collect_gpu_gauges(gpus: Callable[[], Sequence[GpuStatus]]) -> Mapping[str, tuple[str, GpuValues]]:
    """Return each gauge's description, and its value on every GPU that reports the value."""
    statuses = gpus()
    # All engines of one GPU report the same device memory.
    info = {gpu.name: next(iter(gpu.engines.values()), EngineInfo()) for gpu in statuses}
    gauges: dict[str, tuple[str, dict[str, float | None]]] = {
        "gpu_ready": (
            "Whether this GPU can generate images.",
            {gpu.name: float(gpu.state == "ready") for gpu in statuses},
        ),
        "gpu_requests_running": (
            "Requests assigned to this GPU.",
            {gpu.name: float(gpu.num_running) for gpu in statuses},
        ),
        "gpu_restarts": ("Restarts of this GPU's runner.", {gpu.name: float(gpu.num_restarts) for gpu in statuses}),
        "gpu_unavailable": (
            "Tiers, and ways to run them, that failed or are not possible on this GPU.",
            {gpu.name: float(sum(len(engine.unavailable) for engine in gpu.engines.values())) for gpu in statuses},
        ),
        "device_memory_used_bytes": (
            "GPU memory in use by all processes.",
            {gpu.name: info[gpu.name].used_bytes for gpu in statuses},
        ),
        "device_memory_bytes": (
            "Total GPU memory.",
            {gpu.name: info[gpu.name].total_bytes for gpu in statuses},
        ),
    }
    nodes = {gpu.name: gpu.node for gpu in statuses}
    return {
        name: (description, {(gpu, nodes[gpu]): float(value) for gpu, value in values.items() if value is not None})
        for name, (description, values) in gauges.items()
    }
