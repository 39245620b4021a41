"""A key's usage per day and endpoint, from the table `usage`, whose rows stay when requests are deleted."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from server.storage.database import Database


@dataclass(frozen=True)
class UsageFilter:
    """A filter for one owner's usage: the UTC days from `first` to `last`, both included. No endpoints means all."""

    owner: str
    first: date
    last: date
    endpoints: Sequence[str] = ()


@dataclass(frozen=True)
class UsageRow:
    """The successful requests of one endpoint on one day, and their megapixels, rounded up for each image."""

    day: date
    endpoint: str
    requests: int
    billable_units: int


def query_usage(database: Database, query: UsageFilter) -> list[UsageRow]:
    """Return the usage, oldest day first; reads the disk."""
    rows = database.read(
        "SELECT day, endpoint, requests, billable_units FROM usage WHERE owner = ? AND day BETWEEN ? AND ?"
        " ORDER BY day, endpoint",
        query.owner,
        query.first.isoformat(),
        query.last.isoformat(),
    )
    usage = [UsageRow(date.fromisoformat(row["day"]), *tuple(row)[1:]) for row in rows]
    return [entry for entry in usage if not query.endpoints or entry.endpoint in query.endpoints]
