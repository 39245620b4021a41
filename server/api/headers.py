"""Parsers for fal's request headers and query parameters."""

import json
import math
import time
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from server.errors import BadRequest, InvalidInput
from server.net.outbound import ForbiddenURL, OutboundClient
from server.queue.jobs import Priority
from server.storage.file_store import Lifecycle

#: Start timeouts must be longer than this many seconds, as at fal.
MIN_START_TIMEOUT = 0.1
MAX_IDEMPOTENCY_KEY = 255
MAX_RUNNER_HINT = 255
MAX_WEBHOOK_URL = 2048
#: The two names of one header, the newer first. fal's Python client sends both, the JavaScript clients one of them.
_NAMES = ("x-fal-object-lifecycle-preference", "x-fal-object-lifecycle")
#: A query parameter that is on with 1 or true, and off with everything else. Some generated clients send 1 as 1.0.
Flag = Annotated[bool, BeforeValidator(lambda text: str(text).lower() in ("1", "1.0", "true"))]
#: Values in fal's access lists for a file that only its owner may read.
_PRIVATE = ("forbid", "hide")


def priority(headers: Mapping[str, str]) -> Priority:
    """Parse X-Fal-Queue-Priority. As at fal, "low" lowers the priority, and all other values are ignored."""
    is_low = headers.get("x-fal-queue-priority", "").strip().lower() == Priority.LOW
    return Priority.LOW if is_low else Priority.NORMAL


def start_deadline(headers: Mapping[str, str]) -> float | None:
    """Parse the start timeout, and return the deadline in seconds since 1970, or None. Raises BadRequest.

    X-Fal-Request-Start-Timeout, the newer header, overrides X-Fal-Request-Timeout.
    """
    newer = headers.get("x-fal-request-start-timeout")
    text = newer or headers.get("x-fal-request-timeout")
    if text is None:
        return None
    name = "X-Fal-Request-Start-Timeout" if newer else "X-Fal-Request-Timeout"
    seconds = number(text, name)
    if seconds <= MIN_START_TIMEOUT:
        raise BadRequest(f"{name} should be greater than {MIN_START_TIMEOUT} seconds, not {seconds:g}")
    return time.time() + seconds


def webhook_url(parameters: Mapping[str, str], outbound: OutboundClient) -> str | None:
    """Parse the query parameter `fal_webhook`. Raises InvalidInput for a URL that is too long or that is forbidden."""
    url = parameters.get("fal_webhook")
    if not url:
        return None
    if len(url) > MAX_WEBHOOK_URL:
        message = f"URL should have at most {MAX_WEBHOOK_URL} characters"
        raise InvalidInput.of("url_too_long", ("query", "fal_webhook"), message, url[:1000])
    try:
        outbound.check(url)
    except ForbiddenURL as error:
        raise InvalidInput.of("value_error", ("query", "fal_webhook"), str(error), url[:1000]) from None
    return url


def idempotency_key(headers: Mapping[str, str]) -> str | None:
    """Parse Idempotency-Key. Raises BadRequest if it is empty or too long."""
    key = headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY:
        raise BadRequest(f"Idempotency-Key should have 1 to {MAX_IDEMPOTENCY_KEY} characters, not {len(key)}")
    return key


def runner_hint(headers: Mapping[str, str]) -> str | None:
    """Parse X-Fal-Runner-Hint. Raises BadRequest if it is too long."""
    hint = headers.get("x-fal-runner-hint")
    if hint is not None and len(hint) > MAX_RUNNER_HINT:
        raise BadRequest(f"X-Fal-Runner-Hint should have at most {MAX_RUNNER_HINT} characters, not {len(hint)}")
    return hint


def max_queue_length(parameters: Mapping[str, str]) -> int | None:
    """Parse the query parameter `fal_max_queue_length`. Raises BadRequest if it is not a number of 1 or more."""
    text = parameters.get("fal_max_queue_length")
    if text is None:
        return None
    return int(number(text, "fal_max_queue_length", 1))


def lifecycle(headers: Mapping[str, str]) -> Lifecycle:
    """Parse X-Fal-Object-Lifecycle-Preference: how long files are kept and who may read them. Raises BadRequest."""
    text = next((headers[name] for name in _NAMES if headers.get(name)), None)
    if text is None:
        return Lifecycle()
    try:
        preference = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest("X-Fal-Object-Lifecycle-Preference should be JSON") from None
    if not isinstance(preference, dict):
        preference = {"expiration_duration_seconds": preference}
    return Lifecycle(_seconds(preference.get("expiration_duration_seconds")), _is_private(preference))


def _seconds(value: object) -> float | None:
    if value is None:
        return None
    # Zero means no expiry, as in fal's client.
    return number(value, "X-Fal-Object-Lifecycle-Preference's expiration_duration_seconds") or None


def _is_private(preference: dict[str, Any]) -> bool:
    acl = preference.get("initial_acl")
    if acl is None:
        return False
    default = acl.get("default") if isinstance(acl, dict) else acl
    if default not in (*_PRIVATE, "allow", None):
        raise BadRequest(
            "X-Fal-Object-Lifecycle-Preference's initial_acl, or its default, should be allow, hide or forbid"
        )
    return default in _PRIVATE


def number(value: object, name: str, minimum: float = 0) -> float:
    """Parse a number from the header or parameter `name`. Raises BadRequest unless finite and at least `minimum`."""
    try:
        result = float(str(value))
    except ValueError:
        result = math.nan
    if not math.isfinite(result) or result < minimum:
        raise BadRequest(f"{name} should be a finite number of at least {minimum:g}, not {str(value)[:50]!r}")
    return result
