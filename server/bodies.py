"""What a body says: JSON, as one of our models."""

import codecs
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from server import wire
from server.errors import InvalidInput

Body = TypeVar("Body", bound=BaseModel)

#: Values in one body. One of nothing but empty maps takes forty times its own size once it is read, and seconds.
MAX_VALUES = 100_000
_PART = 2**20


def read(kind: type[Body], body: bytes, context: Mapping[str, Any] | None = None) -> Body:
    """Raises InvalidInput, with every field that is wrong."""
    # There are no more values than these; what makes honest bodies long, base64, has none of them.
    if _num_marks(body) > MAX_VALUES:
        message = f"Body should have at most {MAX_VALUES} values"
        raise InvalidInput([{"type": "too_long", "loc": ["body"], "msg": message, "input": ""}])
    try:
        # Some tools write a byte order mark, which JSON does not have.
        return kind.model_validate_json(body.removeprefix(codecs.BOM_UTF8), context=dict(context or {}))
    except ValidationError as error:
        raise InvalidInput(wire.detail(error.errors(include_url=False), body)) from None


def _num_marks(body: bytes) -> int:
    """Counted part by part, so that in a thread it holds nobody up."""
    starts = range(0, len(body), _PART)
    return sum(body.count(mark, start, start + _PART) for mark in (b"{", b"[", b",") for start in starts)
