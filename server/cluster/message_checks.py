"""What a runner reports, looked over before the head acts on it: a faulty runner must harm no request but its own."""

import contextlib
import math
from collections.abc import Mapping
from logging import LogRecord

from pydantic_core import from_json

from models.base import LoadProgress
from server.cluster import messages
from server.queue.jobs import Job, Outcome
from server.storage.file_store import StoredFile, is_file_name

#: Characters of an answer: SQLite holds a thousand million bytes.
MAX_BODY = 2**28
#: Characters of a preview, as a data URI.
MAX_PREVIEW = 2**23
#: Characters of a line for a log, and lines of a request's log.
MAX_LINE, MAX_LINES = 2**16, 10_000
#: Characters of a word, such as a level or a tier.
_MAX_WORD = 255
#: What SQLite holds as an integer.
_MAX_UNITS = 2**63 - 1
_CONTENT_TYPES = ("image/jpeg", "image/png")
#: Statuses a request can end with.
_OK, _ERRORS = 200, range(400, 600)


class ImplausibleMessage(Exception):
    """A report that no runner in order makes; says what is wrong with it."""


def check(message: messages.Message, jobs: Mapping[str, Job]) -> Job | None:
    """The job that a report is about, if the runner has it. Raises ImplausibleMessage."""
    request_id = getattr(message, "request_id", "")
    _require(isinstance(request_id, str), "a request id that is no text")
    job = jobs.get(request_id)
    match message:
        case messages.JobProgress() if job:
            _check_progress(message, job)
        case messages.JobLog() if job:
            _check_log(message, job)
        case messages.JobFinished() if job:
            _check_outcome(message.outcome)
            _check_files(message, job)
        case messages.CrashReported():
            _require(all(isinstance(name, str) for name in message.request_ids), "a strike against no request")
        case messages.RunnerState():
            _require(
                isinstance(message.loading, LoadProgress) and isinstance(message.engines, Mapping),
                "a state that is none",
            )
        case messages.StepMeasured():
            _require(_is_text(message.acceleration, _MAX_WORD) and _is_time(message.seconds), "a step that is none")
        case messages.ImagesGenerated():
            numbers = (message.num_images, message.num_flagged)
            _require(all(_is_count(number, _MAX_WORD) for number in numbers), "a number of pictures that is none")
        case messages.LogRecord():
            record = message.record
            is_line = isinstance(record, LogRecord) and isinstance(record.msg, str) and not record.args
            _require(is_line, "a line for the log that is none")
        case messages.RunnerStopped():
            _require(message.failure is None or _is_text(message.failure, MAX_LINE), "an end that makes no sense")
    return job


def _check_progress(message: messages.JobProgress, job: Job) -> None:
    are_counts = _is_count(message.num_steps, MAX_LINES) and _is_count(message.step, message.num_steps)
    _require(are_counts, "a step that is none")
    _require(message.preview is None or _is_text(message.preview, MAX_PREVIEW), "a preview that is too large")
    _require(len(job.logs) < MAX_LINES, f"more than {MAX_LINES} lines for the log of a request")


def _check_log(message: messages.JobLog, job: Job) -> None:
    are_texts = _is_text(message.message, MAX_LINE) and _is_text(message.level, _MAX_WORD)
    _require(are_texts, "a line for the log of a request that is none, or is too long")
    _require(len(job.logs) < MAX_LINES, f"more than {MAX_LINES} lines for the log of a request")


def _check_outcome(outcome: Outcome) -> None:
    _require(isinstance(outcome, Outcome), "an outcome that is none")
    _require(_is_count(outcome.status, _ERRORS[-1]), "a status that is none")
    _require(outcome.status == _OK or outcome.status in _ERRORS, f"a status of {outcome.status}")
    _require(_is_text(outcome.body, MAX_BODY), f"an answer that is no text, or has more than {MAX_BODY} characters")
    _require(_is_object(outcome.body), "an answer that is not JSON")
    texts = (outcome.error, outcome.error_type, outcome.acceleration)
    _require(all(text is None or _is_text(text, MAX_LINE) for text in texts), "an error that is no text")
    _require(outcome.inference_time is None or _is_time(outcome.inference_time), "a time that is none")
    _require(_is_count(outcome.billable_units, _MAX_UNITS), "billable units that are none")


def _check_files(message: messages.JobFinished, job: Job) -> None:
    files = message.outcome.files
    for file in files:
        _require(
            isinstance(file, StoredFile) and isinstance(file.name, str) and is_file_name(file.name), "a file's bad name"
        )
        content = message.contents.get(file.name)
        _require(isinstance(content, bytes), "a file without its content")
        _require(file.size == len(content or b""), "a file of another size")
        _require(file.owner == job.owner and file.is_private == job.lifecycle.is_private, "a file of somebody else's")
        _require(file.content_type in _CONTENT_TYPES and file.file_name is None, "a file that is no picture")
    _require(len({file.name for file in files}) == len(files), "two files of one name")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ImplausibleMessage(f"it reported {problem}")


def _is_text(value: object, max_length: int) -> bool:
    if not isinstance(value, str) or len(value) > max_length:
        return False
    # The database takes no other.
    with contextlib.suppress(UnicodeEncodeError):
        return bool(value.encode()) or not value
    return False


def _is_count(value: object, highest: int) -> bool:
    return isinstance(value, int) and 0 <= value <= highest


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _is_object(text: str) -> bool:
    try:
        return isinstance(from_json(text), dict)
    except ValueError:
        return False
