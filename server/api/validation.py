"""What a body says: JSON, as one of our models."""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.errors import InvalidInput

Body = TypeVar("Body", bound=BaseModel)

#: Values in one body. One of nothing but empty maps takes forty times its own size once it is read, and seconds.
MAX_VALUES = 100_000
_PART = 2**20
#: Lines of a body that are counted to say where its JSON breaks.
_MAX_LINES = 10_000


def parse_body(kind: type[Body], body: bytes, context: Mapping[str, Any] | None = None) -> Body:
    """Raises InvalidInput, with every field that is wrong."""
    # There are no more values than these; what makes honest bodies long, base64, has none of them.
    if _count_values(body) > MAX_VALUES:
        message = f"Body should have at most {MAX_VALUES} values"
        raise InvalidInput([{"type": "too_long", "loc": ["body"], "msg": message, "input": ""}])
    try:
        # Some tools write a byte order mark, which JSON does not have.
        return kind.model_validate_json(body.removeprefix(codecs.BOM_UTF8), context=dict(context or {}))
    except ValidationError as error:
        raise InvalidInput(validation_detail(error.errors(include_url=False), body)) from None


def _count_values(body: bytes) -> int:
    """Counted part by part, so that in a thread it holds nobody up."""
    starts = range(0, len(body), _PART)
    return sum(body.count(mark, start, start + _PART) for mark in (b"{", b"[", b",") for start in starts)


def validation_detail(errors: Sequence[ErrorDetails], body: bytes) -> list[dict[str, Any]]:
    """pydantic's errors as fal lists them: `loc` below "body", and no `url`."""
    return [_entry(entry, body) for entry in errors]


def _entry(entry: ErrorDetails, body: bytes) -> dict[str, Any]:
    loc: list[str | int] = ["body", *entry["loc"]]
    if entry["type"] == "json_invalid":
        return {"type": "json_invalid", "loc": ["body", _offset(entry["msg"], body)], "msg": entry["msg"], "input": {}}
    shown: dict[str, Any] = {"type": entry["type"], "loc": loc, "msg": entry["msg"], "input": _truncate(entry["input"])}
    if "ctx" in entry:
        shown["ctx"] = {name: value for name, value in entry["ctx"].items() if name != "error"}
    return shown


def _offset(message: str, body: bytes) -> int:
    """Where JSON broke, in bytes, from pydantic's "... at line L column C"."""
    words = message.split()
    try:
        line, column = int(words[words.index("line") + 1]), int(words[words.index("column") + 1])
    except (ValueError, IndexError):
        return 0
    start = 0
    # Line by line only as far as a person would look: a body may be nothing but line feeds.
    for _ in range(min(line - 1, _MAX_LINES)):
        start = body.find(b"\n", start) + 1
    return start + max(0, column - 1)


def _truncate(value: object) -> object:
    """What the client sent, unless it is too long to be sent back."""
    text = value if isinstance(value, str) else repr(value)
    return value if len(text) <= 1000 else f"{text[:1000]}…"
