"""The data of /status: the state of a GPU, and queries for the last hour, recent failures, and usage by key."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from models.base import EngineInfo
from server.storage.database import Database

MINUTES = 60
USAGE_DAYS = 30
DAY = 24 * 3600
#: How many of the last day's requests are read for their times, at most, and how many sizes are listed.
_TIMES_REQUESTS, _TIMES_ROWS = 20_000, 30
_FAILURES = 20
_MINUTES = """
    SELECT CAST((finished_at - ?1) / 60 AS INTEGER) AS minute,
        count(*) AS ended, sum(status = 200) AS completed, sum(billable_units) AS billable_units,
        sum((status = 200) * coalesce(iif(json_valid(input), json_extract(input, '$.num_images'), 1), 1))
            AS images,
        avg(started_at - submitted_at) AS wait, avg(inference_time) AS inference
    FROM jobs WHERE state = 'COMPLETED' AND finished_at > ?1 GROUP BY minute
"""
_ENDPOINTS = """
    SELECT endpoint, count(*) AS completed, avg(started_at - submitted_at) AS wait, avg(inference_time) AS inference
    FROM jobs WHERE state = 'COMPLETED' AND status = 200 AND finished_at > ? GROUP BY endpoint ORDER BY endpoint
"""
_LAST_FAILURES = """
    SELECT request_id, endpoint, finished_at, error, error_type FROM jobs
    WHERE status >= 500 ORDER BY finished_at DESC LIMIT ?
"""
_USAGE = """
    SELECT substr(owner, 1, 9) AS owner, sum(requests) AS requests, sum(billable_units) AS billable_units FROM usage
    WHERE day >= ? GROUP BY owner ORDER BY billable_units DESC
"""
# The responses with inline images are large, and slow to parse, so their sizes are not read.
_TIMES = """
    SELECT coalesce(width || 'x' || height, 'unknown') AS size, coalesce(acceleration, 'none') AS acceleration,
        count(*) AS requests,
        avg(inference_time) AS mean, min(inference_time) AS fastest, max(inference_time) AS slowest
    FROM (
        SELECT acceleration, inference_time,
            iif(output_size = 0 AND json_valid(output), json_extract(output, '$.images[0].width'), NULL) AS width,
            iif(output_size = 0 AND json_valid(output), json_extract(output, '$.images[0].height'), NULL) AS height
        FROM jobs WHERE state = 'COMPLETED' AND status = 200 AND finished_at > ? AND inference_time IS NOT NULL
        ORDER BY finished_at DESC LIMIT ?
    ) GROUP BY size, acceleration ORDER BY requests DESC LIMIT ?
"""

#: A minute in which no request finished.
_NOTHING = {"ended": 0, "completed": 0, "billable_units": 0, "images": 0, "wait": None, "inference": None}


@dataclass(frozen=True)
class GpuStatus:
    """The state of one worker and its GPU.

    Attributes:
        name: the number of the worker.
        state: "waiting" for a free GPU in the cluster, "loading" weights, "ready", or "leaving" the cluster while its
            last jobs run.
        node: the address of the machine; empty for the server's own process.
        num_running: the number of requests assigned to the worker.
        num_restarts: how often the worker's process was lost and replaced; 0 without a cluster.
        engines: information about the loaded engines, by their weights.
        failure: why the last process of the worker was lost; empty once the next one is ready.
    """

    name: str
    state: str
    node: str = ""
    num_running: int = 0
    num_restarts: int = 0
    engines: Mapping[str, EngineInfo] = field(default_factory=dict)
    failure: str = ""


def load_overview(database: Database, now: float | None = None, *, fal_price: float = 0) -> dict[str, Any]:
    """Load the data of /status from the database; blocks on the disk. Owners are cut to 9 characters.

    `now` is in seconds since 1970. `fal_price` is the operator's setting; 0 if it is not set.
    """
    now = time.time() if now is None else now
    return {
        "minutes": _minutes(database, now),
        "endpoints": _endpoints(database, now),
        "times": _times(database, now),
        "fal_price": fal_price,
        "failures": _failures(database),
        "usage": _usage(database, now),
    }


def _minutes(database: Database, now: float) -> list[dict[str, Any]]:
    """Summarize the requests that finished in each of the last MINUTES minutes, oldest first.

    `wait` and `inference` are means in seconds.
    """
    rows = database.read(_MINUTES, now - 60 * MINUTES)
    by_minute = {row["minute"]: {name: row[name] for name in _NOTHING} for row in rows}
    return [by_minute.get(minute, _NOTHING) for minute in range(MINUTES)]


def _endpoints(database: Database, now: float) -> list[dict[str, Any]]:
    """Count the successful requests of the last hour by endpoint, and average their times in seconds."""
    return [dict(row) for row in database.read(_ENDPOINTS, now - 60 * MINUTES)]


def _times(database: Database, now: float) -> list[dict[str, Any]]:
    """Summarize the generation times of the last day by size and acceleration, in seconds; most frequent first."""
    return [dict(row) for row in database.read(_TIMES, now - DAY, _TIMES_REQUESTS, _TIMES_ROWS)]


def _failures(database: Database) -> list[dict[str, Any]]:
    """Load the last _FAILURES requests that failed with status 500 or above, newest first."""
    return [dict(row) for row in database.read(_LAST_FAILURES, _FAILURES)]


def _usage(database: Database, now: float) -> list[dict[str, Any]]:
    """Sum the requests and billable units of the last USAGE_DAYS days by key, most units first."""
    first = datetime.fromtimestamp(now, UTC).date() - timedelta(days=USAGE_DAYS - 1)
    return [dict(row) for row in database.read(_USAGE, first.isoformat())]
