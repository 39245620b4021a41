"""What a key has asked for: its finished requests, the newest first, page by page, for as long as they are kept."""

import base64
import binascii
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic_core import from_json

from server.storage.database import Database

#: fal's words for how a request ended.
STATUSES = {
    "success": "status = 200",
    "user_error": "status BETWEEN 400 AND 499",
    "error": "status >= 500",
}
_CURSOR = struct.Struct(">dq")


@dataclass(frozen=True)
class HistoryQuery:
    """One page. Times are seconds since 1970; `ended_before` is left out of it. `cursor` is the page before's."""

    owner: str
    limit: int = 50
    endpoints: Sequence[str] = ()
    ended_from: float = 0.0
    ended_before: float | None = None
    status: str | None = None
    request_id: str | None = None
    cursor: str | None = None
    include_payloads: bool = False


def query_history(database: Database, wanted: HistoryQuery) -> dict[str, Any]:
    """Items, and the next page's cursor; waits for the disk. Raises ValueError for a cursor that is none.

    What came with X-Fal-Store-IO: 0 is not listed, and an answer that holds its pictures itself is left out.
    """
    conditions, values = _conditions(wanted)
    columns = "sequence, request_id, endpoint, submitted_at, started_at, finished_at, status, inference_time"
    if wanted.include_payloads:
        columns += ", input, inputs, CASE WHEN output_size = 0 THEN output END AS output"
    rows = database.read(
        f"SELECT {columns} FROM jobs WHERE {' AND '.join(conditions)}"  # noqa: S608  our own words
        " ORDER BY finished_at DESC, sequence DESC LIMIT ?",
        *values,
        wanted.limit + 1,
    )
    page, has_more = rows[: wanted.limit], len(rows) > wanted.limit
    last = _CURSOR.pack(page[-1]["finished_at"], page[-1]["sequence"]) if has_more else b""
    return {
        "items": [_item(row, has_payloads=wanted.include_payloads) for row in page],
        "next_cursor": base64.urlsafe_b64encode(last).decode() or None,
        "has_more": has_more,
    }


def _conditions(wanted: HistoryQuery) -> tuple[list[str], list[Any]]:
    conditions = ["owner = ?", "state = 'COMPLETED'", "is_kept = 1", "finished_at >= ?"]
    values: list[Any] = [wanted.owner, wanted.ended_from]
    if wanted.ended_before is not None:
        conditions.append("finished_at < ?")
        values.append(wanted.ended_before)
    if wanted.endpoints:
        conditions.append(f"endpoint IN ({', '.join('?' * len(wanted.endpoints))})")
        values += wanted.endpoints
    if wanted.status:
        conditions.append(STATUSES[wanted.status])
    if wanted.request_id:
        conditions.append("request_id = ?")
        values.append(wanted.request_id)
    if wanted.cursor:
        conditions.append("(finished_at, sequence) < (?, ?)")
        values += _place(wanted.cursor)
    return conditions, values


def _place(cursor: str) -> tuple[float, int]:
    try:
        ended_at, sequence = _CURSOR.unpack(base64.b64decode(cursor, altchars=b"-_", validate=True))
    except (binascii.Error, struct.error, ValueError):
        raise ValueError("should be a next_cursor of an earlier page") from None
    return ended_at, sequence


def _item(row: Any, *, has_payloads: bool) -> dict[str, Any]:
    item = {
        "request_id": row["request_id"],
        "endpoint_id": row["endpoint"],
        "sent_at": _when(row["submitted_at"]),
        "started_at": _when(row["started_at"]),
        "ended_at": _when(row["finished_at"]),
        "status_code": row["status"],
        "duration": round(row["finished_at"] - row["submitted_at"], 3),
    }
    if has_payloads:
        item["json_input"] = _strip_inline_inputs(_parsed(row["input"]), _parsed(row["inputs"]))
        item["json_output"] = _parsed(row["output"]) if row["output"] else None
    return item


def _parsed(text: str) -> Any:
    """What JSON says; None for a damaged row's, so that the others of its page are listed."""
    try:
        return from_json(text)
    except ValueError:
        return None


def _strip_inline_inputs(given: Any, held: Any) -> Any:
    """The input without what came in the request itself: it is not kept, and stands there by a name of our own."""
    if not (isinstance(given, dict) and isinstance(held, dict)):
        return given
    for place, name in held.items():
        *path, last = place.split(".")
        inner = given
        for step in path:
            inner = inner[int(step) if step.isdecimal() else step]
        if inner.get(last) == name:
            del inner[last]
    return given


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
