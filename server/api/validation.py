"""Validation of JSON bodies, and 422 details in fal's shape."""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.errors import InvalidInput

Body = TypeVar("Body", bound=BaseModel)

#: Maximum values in one body. Without this limit, a large body of empty maps would take seconds to parse, and memory of
#: forty times its size.
MAX_VALUES = 100_000
#: How many bytes of a body are searched at a time when its values are counted.
_PART = 2**20
#: Maximum lines of a body to count when locating a JSON error.
_MAX_LINES = 10_000


def parse_body(kind: type[Body], body: bytes, context: Mapping[str, Any] | None = None) -> Body:
    """Parse a JSON body; pydantic's validators receive `context`. Raises InvalidInput, listing every wrong field."""
    # The count includes characters inside strings, but long base64 data contains none of the counted characters.
    if _count_values(body) > MAX_VALUES:
        raise InvalidInput.of("too_long", ("body",), f"Body should have at most {MAX_VALUES} values")
    try:
        # Some tools write a byte order mark, which JSON does not allow.
        return kind.model_validate_json(body.removeprefix(codecs.BOM_UTF8), context=dict(context or {}))
    except ValidationError as error:
        raise InvalidInput(validation_detail(error.errors(include_url=False), body)) from None


def _count_values(body: bytes) -> int:
    """Count `{`, `[` and commas, of which a body has about one for each value.

    The body is counted part by part, so that other threads can run in between.
    """
    starts = range(0, len(body), _PART)
    return sum(body.count(mark, start, start + _PART) for mark in (b"{", b"[", b",") for start in starts)


def validation_detail(errors: Sequence[ErrorDetails], body: bytes) -> list[dict[str, Any]]:
    """Convert pydantic's errors to fal's form: `loc` starts with "body", and long inputs are shortened."""
    return [_entry(entry, body) for entry in errors]


def _entry(entry: ErrorDetails, body: bytes) -> dict[str, Any]:
    loc: list[str | int] = ["body", *entry["loc"]]
    if entry["type"] == "json_invalid":
        return {"type": "json_invalid", "loc": ["body", _offset(entry["msg"], body)], "msg": entry["msg"], "input": {}}
    detail: dict[str, Any] = {
        "type": entry["type"],
        "loc": loc,
        "msg": entry["msg"],
        "input": _truncate(entry["input"]),
    }
    if "ctx" in entry:
        detail["ctx"] = {name: value for name, value in entry["ctx"].items() if name != "error"}
    return detail


def _offset(message: str, body: bytes) -> int:
    """Return the byte offset of a JSON error, from pydantic's "... at line L column C"; 0 if that is missing."""
    words = message.split()
    try:
        line, column = int(words[words.index("line") + 1]), int(words[words.index("column") + 1])
    except (ValueError, IndexError):
        return 0
    start = 0
    # Stop after _MAX_LINES lines, because a body may consist of nothing but line feeds.
    for _ in range(min(line - 1, _MAX_LINES)):
        start = body.find(b"\n", start) + 1
    return start + max(0, column - 1)


def _truncate(value: object) -> object:
    """Return the client's value, shortened if it has more than 1000 characters."""
    text = value if isinstance(value, str) else repr(value)
    return value if len(text) <= 1000 else f"{text[:1000]}…"
