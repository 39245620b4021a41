"""Descriptions of the headers and query parameters that `server.api.headers` parses, for the OpenAPI document."""

from typing import Any

from server.api.headers import MAX_IDEMPOTENCY_KEY, MAX_RUNNER_HINT, MAX_WEBHOOK_URL, MIN_START_TIMEOUT
from server.api.operations import parameter

_START_TIMEOUT = {"type": "number", "exclusiveMinimum": MIN_START_TIMEOUT}
#: The parameters by their names among the components. Those for the queue alone have names that start with `queue_`.
PARAMETERS: dict[str, dict[str, Any]] = {
    "queue_webhook": parameter(
        "query",
        "fal_webhook",
        {
            "type": "string",
            "format": "uri",
            "maxLength": MAX_WEBHOOK_URL,
            "description": "The URL that the server calls with the result.",
        },
    ),
    "queue_idempotency_key": parameter(
        "header",
        "Idempotency-Key",
        {
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_IDEMPOTENCY_KEY,
            "description": "A second request with the same key does not run again; the response is that of the first.",
        },
    ),
    "max_queue_length": parameter(
        "query",
        "fal_max_queue_length",
        {
            "type": "integer",
            "minimum": 1,
            "description": "Refuse the request with 429 if this many requests, or more, are waiting.",
        },
    ),
    "priority": parameter(
        "header",
        "X-Fal-Queue-Priority",
        {
            "type": "string",
            "enum": ["normal", "low"],
            "description": "Requests of low priority run after those of normal priority.",
        },
    ),
    "request_start_timeout": parameter(
        "header",
        "X-Fal-Request-Start-Timeout",
        {**_START_TIMEOUT, "description": "The seconds in which the request must start, or else it fails with 504."},
    ),
    "start_timeout": parameter(
        "header",
        "X-Fal-Request-Timeout",
        {**_START_TIMEOUT, "description": "The older name of X-Fal-Request-Start-Timeout, which overrides it."},
    ),
    "runner_hint": parameter(
        "header",
        "X-Fal-Runner-Hint",
        {
            "type": "string",
            "maxLength": MAX_RUNNER_HINT,
            "description": "Requests with the same hint run on the same GPU where possible.",
        },
    ),
    "store_io": parameter(
        "header",
        "X-Fal-Store-IO",
        {
            "type": "string",
            "enum": ["0", "1"],
            "description": "With 0, the request is in no list of requests, and it is deleted with its result soon "
            "after the client first fetches the result.",
        },
    ),
    "lifecycle": parameter(
        "header",
        "X-Fal-Object-Lifecycle-Preference",
        {
            "type": "string",
            "description": "How long the files are kept and who may read them, as JSON. The older name of the header, "
            "X-Fal-Object-Lifecycle, works too.",
            "examples": ['{"expiration_duration_seconds": 3600}'],
        },
    ),
}


def references(*names: str) -> list[dict[str, str]]:
    """Return references to PARAMETERS."""
    return [{"$ref": f"#/components/parameters/{name}"} for name in names]
