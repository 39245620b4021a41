"""The state of the server at this moment, for who reads the metrics."""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from models.base import About
from server.database import Database

_FIRST = "SELECT submitted_at FROM jobs WHERE state = 'IN_QUEUE' AND (priority = 'low') = ? ORDER BY sequence LIMIT 1"


def read(
    database: Database, data_dir: Path, is_ready: Callable[[], bool], engines: Callable[[], Mapping[str, About]]
) -> Mapping[str, tuple[str, float]]:
    """What each means, and its value; waits for the disk."""
    disk = shutil.disk_usage(data_dir)
    (due,) = database.read("SELECT count(*) AS number FROM deliveries WHERE due_at IS NOT NULL")
    # The first of each priority; one of low priority may have waited for longest.
    firsts = [database.read(_FIRST, is_low) for is_low in (False, True)]
    (waiting,) = database.read("SELECT count(*) AS number FROM jobs WHERE state = 'IN_QUEUE'")
    (running,) = database.read("SELECT count(*) AS number FROM jobs WHERE state = 'IN_PROGRESS'")
    oldest = max((max(0.0, time.time() - row["submitted_at"]) for rows in firsts for row in rows), default=0.0)
    (kept,) = database.read("SELECT coalesce(sum(size), 0) AS size FROM files")
    # All engines are on one device.
    loaded = engines()
    about = next(iter(loaded.values()), About())
    device = {
        "device_memory_used_bytes": ("Of the GPU, by every process on it.", about.used_bytes),
        "device_memory_bytes": ("Of the GPU in all.", about.total_bytes),
    }
    return {
        "ready": ("Whether the models can paint.", float(is_ready())),
        "queue_length": ("Requests that wait.", float(waiting["number"])),
        "queue_oldest_seconds": ("How long the one that came first has waited.", oldest),
        "requests_running": ("Requests that are being painted.", float(running["number"])),
        "webhooks_due": ("Webhooks that wait to be sent, or sent again.", float(due["number"])),
        "files_bytes": ("Pictures and uploads that are kept.", float(kept["size"])),
        "disk_free_bytes": ("Free on the disk of the data folder.", float(disk.free)),
        "memory_resident_bytes": ("Of this process.", float(psutil.Process().memory_info().rss)),
        "engines_loaded": ("Sets of weights in memory.", float(len(loaded))),
        **{name: (words, float(value)) for name, (words, value) in device.items() if value is not None},
    }
