"""Prometheus counters, histograms and gauges, with names and units by Prometheus' conventions."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from models.base import EngineInfo
from models.schema import PRESETS
from server.status import GpuStatus
from server.storage.database import Database

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: What it means, and its value now.
Gauge = tuple[str, float]
#: By the GPU's name and its node's.
GpuValues = Mapping[tuple[str, str], float]
_PREFIX = "flux_server_"
_STEPS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WAITS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600)
_FIRST = "SELECT submitted_at FROM jobs WHERE state = 'IN_QUEUE' AND (priority = 'low') = ? ORDER BY sequence LIMIT 1"


class Metrics:
    """One server's. Counters are raised by the parts as things happen, from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.gauges: Callable[[], Mapping[str, Gauge]] = dict
        self.http_requests = self._counter("http_requests", "HTTP requests answered.", "method", "route", "status")
        self.submitted = self._counter("requests_submitted", "Requests accepted.", "endpoint")
        self.ended = self._counter("requests_ended", "Requests that reached their end.", "endpoint", "outcome")
        self.retried = self._counter("requests_retried", "Requests begun another time.", "endpoint")
        self.images = self._counter("pictures", "Pictures painted.", "endpoint")
        self.flagged = self._counter("pictures_flagged", "Pictures that were not shown.", "endpoint")
        self.webhooks = self._counter("webhook_attempts", "Webhooks sent, every attempt.", "outcome")
        self.wait = self._histogram("queue_wait_seconds", "From submit to the first start.", _WAITS, "endpoint")
        self.step = self._histogram("step_seconds", "One forward, alone or shared.", _STEPS, "size", "acceleration")

    def observe_step(self, size: tuple[int, int], acceleration: str, seconds: float) -> None:
        """One forward. Sizes of clients' own making count as one, or they could fill the memory."""
        name = f"{size[0]}x{size[1]}" if size in PRESETS.values() else "other"
        self.step.labels(name, acceleration).observe(seconds)

    def count_images(self, endpoint: str, num_images: int, num_flagged: int) -> None:
        """The pictures of one request, and how many of them are not shown."""
        self.images.labels(endpoint).inc(num_images)
        self.flagged.labels(endpoint).inc(num_flagged)

    def steps(self) -> list[dict[str, Any]]:
        """How many forwards there were since the start, and their mean in seconds, by size and tier."""
        found: dict[tuple[str, str], dict[str, float]] = {}
        for sample in (sample for metric in self.step.collect() for sample in metric.samples):
            kind = sample.name.rpartition("_")[2]
            if kind in ("sum", "count"):
                found.setdefault((sample.labels["size"], sample.labels["acceleration"]), {})[kind] = sample.value
        return [
            {"size": size, "acceleration": tier, "count": int(seen["count"]), "seconds": seen["sum"] / seen["count"]}
            for (size, tier), seen in found.items()
        ]

    def observe_start(self, endpoint: str, attempt: int, waited: float) -> None:
        """A request was claimed, `waited` seconds after its submit."""
        if attempt > 1:
            self.retried.labels(endpoint).inc()
        else:
            self.wait.labels(endpoint).observe(max(0.0, waited))

    def count_end(self, endpoint: str, status: int, *, is_cancelled: bool) -> None:
        """A request reached its end."""
        outcome = "cancelled" if is_cancelled else "completed" if status == 200 else "failed"
        self.ended.labels(endpoint, outcome).inc()

    def add_gauges(
        self, gauges: Callable[[], Mapping[str, Gauge]], by_gpu: Callable[[], Mapping[str, tuple[str, GpuValues]]]
    ) -> None:
        """Ask for these each time the metrics are read: what they mean, and their values now, in all and by GPU."""
        self.gauges = gauges
        self.registry.register(_Gauges(gauges, by_gpu))

    def text(self) -> bytes:
        """All of them, in the form that Prometheus reads."""
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
        """The values of this moment."""
        found = [
            GaugeMetricFamily(f"{_PREFIX}{name}", description, value)
            for name, (description, value) in self._read().items()
        ]
        for name, (description, values) in self._by_gpu().items():
            family = GaugeMetricFamily(f"{_PREFIX}{name}", description, labels=("gpu", "node"))
            for labels, value in values.items():
                family.add_metric(labels, value)
            found.append(family)
        return list(found)


def collect_gauges(
    database: Database, data_dir: Path, is_ready: Callable[[], bool], gpus: Callable[[], Sequence[GpuStatus]]
) -> Mapping[str, Gauge]:
    """What each means, and its value; waits for the disk."""
    disk = shutil.disk_usage(data_dir)
    (due,) = database.read("SELECT count(*) AS number FROM deliveries WHERE due_at IS NOT NULL")
    # The first of each priority; one of low priority may have waited for longest.
    firsts = [database.read(_FIRST, is_low) for is_low in (False, True)]
    (waiting,) = database.read("SELECT count(*) AS number FROM jobs WHERE state = 'IN_QUEUE'")
    (running,) = database.read("SELECT count(*) AS number FROM jobs WHERE state = 'IN_PROGRESS'")
    oldest = max((max(0.0, time.time() - row["submitted_at"]) for rows in firsts for row in rows), default=0.0)
    (kept,) = database.read("SELECT coalesce(sum(size), 0) AS size FROM files")
    return {
        "ready": ("Whether the models can paint.", float(is_ready())),
        "queue_length": ("Requests that wait.", float(waiting["number"])),
        "queue_oldest_seconds": ("How long the one that came first has waited.", oldest),
        "requests_running": ("Requests that are being painted.", float(running["number"])),
        "webhooks_due": ("Webhooks that wait to be sent, or sent again.", float(due["number"])),
        "files_bytes": ("Pictures and uploads that are kept.", float(kept["size"])),
        "disk_free_bytes": ("Free on the disk of the data folder.", float(disk.free)),
        "memory_resident_bytes": ("Of this process.", float(psutil.Process().memory_info().rss)),
        "engines_loaded": ("Sets of weights in memory.", float(sum(len(gpu.engines) for gpu in gpus()))),
    }


def collect_gpu_gauges(gpus: Callable[[], Sequence[GpuStatus]]) -> Mapping[str, tuple[str, GpuValues]]:
    """What each means, and its value for each GPU that has one."""
    seen = gpus()
    # All engines of one are on one device.
    about = {gpu.name: next(iter(gpu.engines.values()), EngineInfo()) for gpu in seen}
    found: dict[str, tuple[str, dict[str, float | None]]] = {
        "gpu_ready": ("Whether this GPU can paint.", {gpu.name: float(gpu.state == "ready") for gpu in seen}),
        "gpu_requests_running": ("Requests that this GPU has.", {gpu.name: float(gpu.num_running) for gpu in seen}),
        "gpu_restarts": ("How often its runner was lost.", {gpu.name: float(gpu.num_restarts) for gpu in seen}),
        "device_memory_used_bytes": (
            "Of the GPU, by every process on it.",
            {gpu.name: about[gpu.name].used_bytes for gpu in seen},
        ),
        "device_memory_bytes": ("Of the GPU in all.", {gpu.name: about[gpu.name].total_bytes for gpu in seen}),
    }
    nodes = {gpu.name: gpu.node for gpu in seen}
    return {
        name: (description, {(gpu, nodes[gpu]): float(value) for gpu, value in values.items() if value is not None})
        for name, (description, values) in found.items()
    }
