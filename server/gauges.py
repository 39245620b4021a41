"""The state of the server at this moment, for who reads the metrics."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from models.base import About
from server.database import Database
from server.gpu import Gpu
from server.metrics import Gauge, GpuValues

_FIRST = "SELECT submitted_at FROM jobs WHERE state = 'IN_QUEUE' AND (priority = 'low') = ? ORDER BY sequence LIMIT 1"


def read(
    database: Database, data_dir: Path, is_ready: Callable[[], bool], gpus: Callable[[], Sequence[Gpu]]
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


def by_gpu(gpus: Callable[[], Sequence[Gpu]]) -> Mapping[str, tuple[str, GpuValues]]:
    """What each means, and its value for each GPU that has one."""
    seen = gpus()
    # All engines of one are on one device.
    about = {gpu.name: next(iter(gpu.engines.values()), About()) for gpu in seen}
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
        name: (words, {(gpu, nodes[gpu]): float(value) for gpu, value in values.items() if value is not None})
        for name, (words, values) in found.items()
    }
