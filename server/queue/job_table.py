"""SQL for the jobs table. Each change of state is one UPDATE that matches only a row in the expected state."""

import json
import sqlite3
import uuid
from datetime import UTC, datetime
from typing import Any, cast

from pydantic_core import from_json

from server.errors import InternalError, InvalidInput
from server.queue.jobs import PROVENANCE, Job, Mode, Outcome, Priority, Provenance, State, Submission
from server.storage.file_store import Lifecycle, insert_file_row

#: Responses larger than this, in bytes, are taken to hold inline images, which makes them slow to parse.
SMALL_OUTPUT = 16_384
#: Bytes that are counted for a finished row in addition to its texts: the other columns and the indexes.
_ROW_BYTES = 1024

_CLAIM = """
    UPDATE jobs SET state = 'IN_PROGRESS', attempt = attempt + 1, started_at = :now
    WHERE sequence = :sequence AND state = 'IN_QUEUE'
    RETURNING attempt, input, submitted_at
"""

_COMPLETE = """
    UPDATE jobs SET state = 'COMPLETED', finished_at = :now, status = :status, output = :output,
        output_size = :output_size,
        input = CASE WHEN :is_cancelled THEN '{}' ELSE input END,
        inputs = CASE WHEN :is_cancelled THEN '{}' ELSE inputs END,
        error = :error, error_type = :error_type, inference_time = :inference_time,
        acceleration = :acceleration, dtype = :dtype, weights = :weights, memory = :memory,
        billable_units = :billable_units, logs = :logs, is_cancelled = :is_cancelled
    WHERE request_id = :request_id AND state = :state AND state <> 'COMPLETED' AND attempt = :attempt
"""

_INSERT_DELIVERY = """
    INSERT INTO deliveries (request_id, url, due_at)
    SELECT request_id, webhook_url, ? FROM jobs WHERE request_id = ? AND webhook_url IS NOT NULL
"""

_ADD_USAGE = """
    INSERT INTO usage VALUES (?, ?, ?, 1, ?) ON CONFLICT DO UPDATE
    SET requests = requests + 1, billable_units = billable_units + excluded.billable_units
"""


def insert(connection: sqlite3.Connection, submission: Submission, now: float) -> Job:
    """Insert a job IN_QUEUE with a new request id; return its in-memory copy."""
    request_id = str(uuid.uuid4())
    values = {
        "request_id": request_id,
        "endpoint": submission.endpoint,
        "owner": submission.owner,
        "mode": submission.mode,
        "priority": submission.priority,
        "input": submission.input,
        "inputs": json.dumps(dict(submission.input_files)),
        "base_url": submission.base_url,
        "webhook_url": submission.webhook_url,
        "idempotency_key": submission.idempotency_key,
        "body_hash": submission.body_hash,
        "start_deadline": submission.start_deadline,
        "is_kept": submission.store_io,
        "file_lifetime": submission.lifecycle.lifetime,
        "is_private": submission.lifecycle.is_private,
        "state": State.IN_QUEUE,
        "submitted_at": now,
    }
    names = ", ".join(values)
    marks = ", ".join(f":{name}" for name in values)
    cursor = connection.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", values)  # noqa: S608  fixed names
    return Job(
        sequence=cursor.lastrowid or 0,
        request_id=request_id,
        endpoint=submission.endpoint,
        owner=submission.owner,
        mode=submission.mode,
        priority=submission.priority,
        base_url=submission.base_url,
        state=State.IN_QUEUE,
        start_deadline=submission.start_deadline,
        store_io=submission.store_io,
        lifecycle=submission.lifecycle,
        input_files=submission.input_files,
        input_size=len(submission.input.encode()),
        runner_hint=submission.runner_hint,
    )


def find_by_idempotency_key(connection: sqlite3.Connection, submission: Submission) -> sqlite3.Row | None:
    """Return the row of this owner and endpoint that has the same Idempotency-Key, or None.

    Raises InvalidInput if the body of that request was different.
    """
    if submission.idempotency_key is None:
        return None
    row: sqlite3.Row | None = connection.execute(
        "SELECT * FROM jobs WHERE owner = ? AND endpoint = ? AND idempotency_key = ?",
        (submission.owner, submission.endpoint, submission.idempotency_key),
    ).fetchone()
    if row and row["body_hash"] != submission.body_hash:
        message = "Idempotency-Key was already used with a different body; send a new key"
        raise InvalidInput.of("value_error", ("header", "idempotency-key"), message)
    return row


def claim(connection: sqlite3.Connection, job: Job, now: float) -> sqlite3.Row:
    """Set a waiting job IN_PROGRESS; return its attempt, input and submitted_at.

    Raises RuntimeError if the job is not waiting.
    """
    row: sqlite3.Row | None = connection.execute(_CLAIM, {"now": now, "sequence": job.sequence}).fetchone()
    if row is None:
        raise RuntimeError(f"{job.request_id} is not waiting in the queue")
    return row


def complete(connection: sqlite3.Connection, job: Job, outcome: Outcome, now: float, *, is_cancelled: bool) -> None:
    """Set a job COMPLETED: store its response and files, count its usage, and make its webhook due.

    A cancelled job's input is cleared. Raises RuntimeError when the row's state or attempt differs from `job`'s.
    """
    logs, num_bytes = json.dumps(job.logs), len(outcome.body.encode())
    values = {
        "now": now,
        "status": outcome.status,
        "output": outcome.body,
        "output_size": num_bytes if num_bytes > SMALL_OUTPUT else 0,
        "error": outcome.error,
        "error_type": outcome.error_type,
        "inference_time": outcome.inference_time,
        **{name: outcome.provenance.get(name) for name in PROVENANCE},
        "billable_units": outcome.billable_units,
        "logs": logs,
        "is_cancelled": is_cancelled,
        "request_id": job.request_id,
        "state": job.state,
        "attempt": job.attempt,
    }
    if connection.execute(_COMPLETE, values).rowcount != 1:
        raise _stale_job_error(job)
    row_bytes = _ROW_BYTES + num_bytes + len(logs) + (0 if is_cancelled else job.input_size)
    connection.execute("INSERT INTO row_sizes VALUES (?, ?, ?, ?)", (job.request_id, job.owner, row_bytes, now))
    for file in outcome.files:
        insert_file_row(connection, file, job.request_id, now)
    if outcome.status == 200:
        day = datetime.fromtimestamp(now, UTC).date().isoformat()
        connection.execute(_ADD_USAGE, (job.owner, day, job.endpoint, outcome.billable_units))
    connection.execute(_INSERT_DELIVERY, (now + job.webhook_delay, job.request_id))


def mark_cancelled(connection: sqlite3.Connection, job: Job) -> None:
    """Mark a running job as cancelled, so that it ends as cancelled even after a restart.

    Raises RuntimeError when the job is not running.
    """
    _guarded(
        connection,
        "UPDATE jobs SET is_cancelled = 1 WHERE request_id = ? AND state = 'IN_PROGRESS' AND attempt = ?",
        job,
    )


def count_crash(connection: sqlite3.Connection, job: Job) -> None:
    """Count one crash of the process while it ran this job. Raises RuntimeError when the job is not running."""
    _guarded(
        connection,
        "UPDATE jobs SET strikes = strikes + 1 WHERE request_id = ? AND state = 'IN_PROGRESS' AND attempt = ?",
        job,
    )


def release(connection: sqlite3.Connection, job: Job) -> None:
    """Set a running job IN_QUEUE again, with the same sequence number and so the same rank.

    Raises RuntimeError when the job is not running.
    """
    _guarded(
        connection,
        "UPDATE jobs SET state = 'IN_QUEUE' WHERE request_id = ? AND state = 'IN_PROGRESS' AND attempt = ?",
        job,
    )


def _guarded(connection: sqlite3.Connection, sql: str, job: Job) -> None:
    if connection.execute(sql, (job.request_id, job.attempt)).rowcount != 1:
        raise _stale_job_error(job)


def _stale_job_error(job: Job) -> RuntimeError:
    return RuntimeError(f"the row of {job.request_id} is not {job.state} in attempt {job.attempt}")


def mark_fetched(connection: sqlite3.Connection, job: Job, now: float) -> None:
    """Record when a client first fetched the result; a later fetch changes nothing."""
    connection.execute(
        "UPDATE jobs SET fetched_at = ? WHERE request_id = ? AND state = 'COMPLETED' AND fetched_at IS NULL",
        (now, job.request_id),
    )


def job_from_row(row: sqlite3.Row) -> Job:
    """Build the in-memory job from a row with all columns.

    Unreadable logs become an empty list. Unreadable input file names set `is_damaged`.
    """
    logs, names = _parse_json(row["logs"] or "[]"), _parse_input_files(row["inputs"])
    return Job(
        sequence=row["sequence"],
        request_id=row["request_id"],
        endpoint=row["endpoint"],
        owner=row["owner"],
        mode=Mode(row["mode"]),
        priority=Priority(row["priority"]),
        base_url=row["base_url"],
        state=State(row["state"]),
        attempt=row["attempt"],
        crash_count=row["strikes"],
        start_deadline=row["start_deadline"],
        is_cancelled=bool(row["is_cancelled"]),
        store_io=bool(row["is_kept"]),
        lifecycle=Lifecycle(row["file_lifetime"], bool(row["is_private"])),
        input_files=names or {},
        input_size=len(row["input"].encode()),
        output_size=row["output_size"],
        is_damaged=names is None,
        error=row["error"],
        error_type=row["error_type"],
        inference_time=row["inference_time"],
        provenance=cast(Provenance, {name: row[name] for name in PROVENANCE if row[name]}),
        logs=logs if isinstance(logs, list) else [],
    )


def outcome_from_row(row: sqlite3.Row) -> Outcome:
    """Return how a completed job ended, from a row with all columns; without its files and `provenance`.

    For a damaged response, return the outcome of an InternalError.
    """
    if not _is_response(row["output"]):
        return Outcome.from_error(InternalError("The stored response of this request is damaged; submit it again."))
    return Outcome(
        row["status"],
        row["output"],
        row["error"],
        row["error_type"],
        row["inference_time"],
        billable_units=row["billable_units"],
    )


def _is_response(text: str) -> bool:
    # A response with inline images takes long to parse, so only its first and last characters are checked.
    if len(text) > SMALL_OUTPUT:
        return text.startswith("{") and text.endswith("}")
    return isinstance(_parse_json(text), dict)


def _parse_input_files(text: str) -> dict[str, str] | None:
    names = _parse_json(text)
    is_whole = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    return names if is_whole else None


def _parse_json(text: str) -> Any:
    """Parse JSON; return None for invalid text."""
    try:
        return from_json(text)
    except ValueError:
        return None
