"""What a key has used, by day and endpoint: counted in the table `usage`, which outlives the requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from server.storage.database import Database


@dataclass(frozen=True)
class UsageFilter:
    """Days from `first` to `last`, both included, in UTC; all endpoints when none is named."""

    owner: str
    first: date
    last: date
    endpoints: Sequence[str] = ()


@dataclass(frozen=True)
class UsageRow:
    """One endpoint on one day: finished requests, and megapixels, each image's rounded up."""

    day: date
    endpoint: str
    requests: int
    billable_units: int


def query_usage(database: Database, wanted: UsageFilter) -> list[UsageRow]:
    """The oldest first; waits for the disk."""
    rows = database.read(
        "SELECT day, endpoint, requests, billable_units FROM usage WHERE owner = ? AND day BETWEEN ? AND ?"
        " ORDER BY day, endpoint",
        wanted.owner,
        wanted.first.isoformat(),
        wanted.last.isoformat(),
    )
    found = [UsageRow(date.fromisoformat(row["day"]), *tuple(row)[1:]) for row in rows]
    return [used for used in found if not wanted.endpoints or used.endpoint in wanted.endpoints]
