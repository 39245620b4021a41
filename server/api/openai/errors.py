"""Errors in the shape of OpenAI's API, for every path under /v1."""

from typing import Any

from pydantic_core import from_json
from starlette.responses import Response

from server.api import responses
from server.api.openai.paths import GENERATIONS, is_openai_path
from server.api.responses import FalJSONResponse
from server.errors import InvalidInput, QueueFull, ServerError, TooManyRequests, Unauthorized, UnknownModel
from server.queue.jobs import Outcome

#: OpenAI's names for fal's fields, so that an error names the field that the client sent.
_NAMES = {"image_size": "size", "num_images": "n", "sync_mode": "response_format"}
#: The same for the fields that a client sends as files.
_FILE_NAMES = {"image_url": "image", "mask_url": "mask"}


def error_response(error: ServerError, path: str) -> Response:
    """Build an error response, in OpenAI's shape for its paths, and in fal's shape for all others."""
    if not is_openai_path(path):
        return responses.error_response(error)
    status = 400 if isinstance(error, InvalidInput) else error.status
    return FalJSONResponse(error_body(error, path), status, error.headers)


def failure_response(outcome: Outcome, path: str) -> FalJSONResponse:
    """Build the response of a failed job, as `error_response` does for the error itself."""
    status = 400 if outcome.status == InvalidInput.status else outcome.status
    return FalJSONResponse(failure_body(outcome, path), status)


def failure_body(outcome: Outcome, path: str) -> dict[str, Any]:
    """Build the body of a failed job's error in OpenAI's shape. `path` is the path of the request."""
    if outcome.status == InvalidInput.status:
        return error_body(InvalidInput(from_json(outcome.body)["detail"]), path)
    return {"error": _error(outcome.status, outcome.error or ServerError.message, outcome.error_type)}


def error_body(error: ServerError, path: str) -> dict[str, Any]:
    """Build the body of an error in OpenAI's shape. `path` is the path of the request."""
    body = _error(error.status, str(error), error.error_type)
    if isinstance(error, InvalidInput):
        names = _NAMES if path == GENERATIONS else _NAMES | _FILE_NAMES
        body |= _first(error.detail, names)
    elif isinstance(error, Unauthorized):
        body["code"] = "invalid_api_key"
    elif isinstance(error, UnknownModel):
        body |= {"code": "model_not_found", "param": "model"}
    elif isinstance(error, QueueFull | TooManyRequests):
        body |= {"type": "rate_limit_error", "code": "rate_limit_exceeded"}
    return {"error": body}


def _error(status: int, message: str, code: str | None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": None, "code": code}


def _first(detail: list[dict[str, Any]], their_names: dict[str, str]) -> dict[str, Any]:
    """Describe the first of the wrong fields, because OpenAI's error names only one field."""
    entry = detail[0]
    # The position of a JSON error is no field.
    names = [] if entry["type"] == "json_invalid" else [str(part) for part in entry["loc"] if part != "body"]
    names = [their_names.get(name, name) for name in names[:1]] + names[1:]
    param = ".".join(names) or None
    return {"message": f"{param}: {entry['msg']}" if param else entry["msg"], "param": param, "code": entry["type"]}
