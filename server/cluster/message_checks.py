"""Checks on runner messages before the head acts on them: a faulty runner must harm only its own requests."""

import contextlib
import math
from collections.abc import Mapping
from logging import LogRecord

from pydantic_core import from_json

from models.base import LoadProgress
from server.cluster import messages
from server.queue.jobs import PROVENANCE, Job, Outcome
from server.storage.file_store import StoredFile, is_file_name

#: Maximum characters of an outcome's body; SQLite holds up to 10**9 bytes.
MAX_BODY = 2**28
#: Maximum characters of a preview, as a data URI.
MAX_PREVIEW = 2**23
#: Maximum characters of a log line, and lines of a request's log.
MAX_LINE, MAX_LINES = 2**16, 10_000
#: Maximum characters of a name, such as a log level or a tier.
_MAX_WORD = 255
#: Maximum images of one request. Far above fal's four, because an endpoint may allow more.
_MAX_IMAGES = 255
#: The longest side of an image in pixels, above any that a server accepts; the highest level of a log line.
_MAX_SIDE, _MAX_LEVEL = 100_000, 1_000
#: The largest integer that SQLite stores.
_MAX_UNITS = 2**63 - 1
_CONTENT_TYPES = ("image/jpeg", "image/png")
#: Statuses that a request can end with.
_OK, _ERRORS = 200, range(400, 600)


class ImplausibleMessage(Exception):
    """A message that no healthy runner sends; the error's text says what is wrong with it."""


def check(message: messages.Message, jobs: Mapping[str, Job]) -> Job | None:
    """Check a message; return the runner's job that the message is about, or None if there is none.

    Raises ImplausibleMessage.
    """
    try:
        return _checked(message, jobs)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        # A field has another type than any of the checks expects.
        raise ImplausibleMessage(
            f"the runner reported {type(message).__name__} with a field of a wrong type"
        ) from error


def _checked(message: messages.Message, jobs: Mapping[str, Job]) -> Job | None:
    request_id = getattr(message, "request_id", "")
    _require(isinstance(request_id, str), "a request id that is not text")
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
            _require(
                all(isinstance(name, str) for name in message.request_ids), "a crash with a request id that is not text"
            )
        case messages.RunnerState():
            _require(
                isinstance(message.loading, LoadProgress) and isinstance(message.engines, Mapping),
                "an invalid state",
            )
        case messages.StepMeasured():
            are_sides = len(message.size) == 2 and all(_is_count(side, _MAX_SIDE) for side in message.size)
            _require(are_sides, "an invalid image size")
            _require(_is_text(message.acceleration, _MAX_WORD) and _is_time(message.seconds), "an invalid step time")
        case messages.ImagesGenerated():
            numbers = (message.num_images, message.num_flagged)
            _require(all(_is_count(number, _MAX_IMAGES) for number in numbers), "an invalid number of images")
            _require(_is_text(message.endpoint, _MAX_WORD), "an invalid endpoint")
        case messages.LogRecord():
            record = message.record
            is_line = isinstance(record, LogRecord) and isinstance(record.msg, str) and not record.args
            _require(is_line, "an invalid log record")
            _require(_is_text(record.name, _MAX_WORD) and _is_count(record.levelno, _MAX_LEVEL), "an invalid logger")
        case messages.RunnerStopped():
            _require(message.failure is None or _is_text(message.failure, MAX_LINE), "an invalid reason for stopping")
    return job


def _check_progress(message: messages.JobProgress, job: Job) -> None:
    are_counts = _is_count(message.num_steps, MAX_LINES) and _is_count(message.step, message.num_steps)
    _require(are_counts, "an invalid step")
    is_preview = message.preview is None or _is_text(message.preview, MAX_PREVIEW)
    _require(is_preview, f"a preview that is not text, or has more than {MAX_PREVIEW} characters")
    _require(len(job.logs) < MAX_LINES, f"more than {MAX_LINES} lines for a request's log")


def _check_log(message: messages.JobLog, job: Job) -> None:
    are_texts = _is_text(message.message, MAX_LINE) and _is_text(message.level, _MAX_WORD)
    _require(are_texts, f"a log line that is not text, or has more than {MAX_LINE} characters")
    _require(len(job.logs) < MAX_LINES, f"more than {MAX_LINES} lines for a request's log")


def _check_outcome(outcome: Outcome) -> None:
    _require(isinstance(outcome, Outcome), "an invalid outcome")
    _require(_is_count(outcome.status, _ERRORS[-1]), f"a status that is not a number up to {_ERRORS[-1]}")
    _require(outcome.status == _OK or outcome.status in _ERRORS, f"status {outcome.status}, which no request ends with")
    _require(_is_text(outcome.body, MAX_BODY), f"an answer that is not text, or has more than {MAX_BODY} characters")
    _require(_is_object(outcome.body), "an answer that is not a JSON object")
    is_provenance = isinstance(outcome.provenance, dict) and set(outcome.provenance) <= set(PROVENANCE)
    are_words = is_provenance and all(_is_text(word, _MAX_WORD) for word in outcome.provenance.values())
    _require(are_words, "an invalid provenance")
    texts = (outcome.error, outcome.error_type)
    are_texts = all(text is None or _is_text(text, MAX_LINE) for text in texts)
    _require(are_texts, "an error that is not a short text")
    _require(outcome.inference_time is None or _is_time(outcome.inference_time), "an invalid inference time")
    _require(_is_count(outcome.billable_units, _MAX_UNITS), "invalid billable units")


def _check_files(message: messages.JobFinished, job: Job) -> None:
    files = message.outcome.files
    for file in files:
        is_named = isinstance(file, StoredFile) and isinstance(file.name, str) and is_file_name(file.name)
        _require(is_named, "a file with an invalid name")
        content = message.contents.get(file.name)
        _require(isinstance(content, bytes), "a file without its content")
        _require(file.size == len(content or b""), "a file whose size does not match its content")
        _require(
            file.owner == job.owner and file.is_private == job.lifecycle.is_private,
            "a file whose owner or privacy is not that of its request",
        )
        _require(file.content_type in _CONTENT_TYPES and file.file_name is None, "a file that is not an image")
    _require(len({file.name for file in files}) == len(files), "two files with the same name")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ImplausibleMessage(f"the runner reported {problem}")


def _is_text(value: object, max_length: int) -> bool:
    if not isinstance(value, str) or len(value) > max_length:
        return False
    # The database stores only text that can be encoded as UTF-8.
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
