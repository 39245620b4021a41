"""Pages of a key's finished requests that are still stored, newest first."""

import base64
import binascii
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic_core import from_json

from server.storage.database import Database

#: fal's names for how a request ended, each with its SQL condition.
STATUSES = {
    "success": "status = 200",
    "user_error": "status BETWEEN 400 AND 499",
    "error": "status >= 500",
}
#: A cursor: `finished_at` and `sequence` of the last item of a page.
_CURSOR = struct.Struct(">dq")


@dataclass(frozen=True)
class HistoryQuery:
    """The filters and size of one page.

    Times are seconds since 1970: `ended_from` is inclusive, `ended_before` exclusive. `status` is a key of STATUSES.
    `cursor` is the `next_cursor` of the previous page.
    """

    owner: str
    limit: int = 50
    endpoints: Sequence[str] = ()
    ended_from: float = 0.0
    ended_before: float | None = None
    status: str | None = None
    request_id: str | None = None
    cursor: str | None = None
    include_payloads: bool = False


def query_history(database: Database, query: HistoryQuery) -> dict[str, Any]:
    """Return one page: its `items`, `next_cursor` (None on the last page) and `has_more`.

    Requests sent with X-Fal-Store-IO: 0 are not listed. `json_output` is None for a large output, which is taken to
    hold inline images. Raises ValueError for an invalid cursor.
    """
    conditions, values = _conditions(query)
    columns = "sequence, request_id, endpoint, submitted_at, started_at, finished_at, status, inference_time"
    if query.include_payloads:
        columns += ", input, inputs, CASE WHEN output_size = 0 THEN output END AS output"
    rows = database.read(
        f"SELECT {columns} FROM jobs WHERE {' AND '.join(conditions)}"  # noqa: S608  no client input in the SQL
        " ORDER BY finished_at DESC, sequence DESC LIMIT ?",
        *values,
        query.limit + 1,
    )
    page, has_more = rows[: query.limit], len(rows) > query.limit
    last = _CURSOR.pack(page[-1]["finished_at"], page[-1]["sequence"]) if has_more else b""
    return {
        "items": [_item(row, include_payloads=query.include_payloads) for row in page],
        "next_cursor": base64.urlsafe_b64encode(last).decode() or None,
        "has_more": has_more,
    }


def _conditions(query: HistoryQuery) -> tuple[list[str], list[Any]]:
    conditions = ["owner = ?", "state = 'COMPLETED'", "is_kept = 1", "finished_at >= ?"]
    values: list[Any] = [query.owner, query.ended_from]
    if query.ended_before is not None:
        conditions.append("finished_at < ?")
        values.append(query.ended_before)
    if query.endpoints:
        conditions.append(f"endpoint IN ({', '.join('?' * len(query.endpoints))})")
        values += query.endpoints
    if query.status:
        conditions.append(STATUSES[query.status])
    if query.request_id:
        conditions.append("request_id = ?")
        values.append(query.request_id)
    if query.cursor:
        conditions.append("(finished_at, sequence) < (?, ?)")
        values += _parse_cursor(query.cursor)
    return conditions, values


def _parse_cursor(cursor: str) -> tuple[float, int]:
    try:
        ended_at, sequence = _CURSOR.unpack(base64.b64decode(cursor, altchars=b"-_", validate=True))
    except (binascii.Error, struct.error, ValueError):
        raise ValueError("should be the next_cursor of an earlier page") from None
    return ended_at, sequence


def _item(row: Any, *, include_payloads: bool) -> dict[str, Any]:
    item = {
        "request_id": row["request_id"],
        "endpoint_id": row["endpoint"],
        "sent_at": _when(row["submitted_at"]),
        "started_at": _when(row["started_at"]),
        "ended_at": _when(row["finished_at"]),
        "status_code": row["status"],
        "duration": round(row["finished_at"] - row["submitted_at"], 3),
    }
    if include_payloads:
        item["json_input"] = _strip_inline_inputs(_parsed(row["input"]), _parsed(row["inputs"]))
        item["json_output"] = _parsed(row["output"]) if row["output"] else None
    return item


def _parsed(text: str) -> Any:
    """Parse JSON; return None for a damaged row, so that the rest of the page is still listed."""
    try:
        return from_json(text)
    except ValueError:
        return None


def _strip_inline_inputs(body: Any, input_files: Any) -> Any:
    """Remove from `body` each input that was sent inline: the row holds only the name of an internal file for it.

    Returns the body, unchanged if the row is damaged.
    """
    if not (isinstance(body, dict) and isinstance(input_files, dict)):
        return body
    for field_path, name in input_files.items():
        *path, last = field_path.split(".")
        inner = body
        for step in path:
            inner = inner[int(step) if step.isdecimal() else step]
        if inner.get(last) == name:
            del inner[last]
    return body


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
