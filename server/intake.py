"""What a client sends, turned into a submission: the body's fields, and fal's headers and parameters."""

import hashlib
import secrets
import time
from collections.abc import Mapping

from starlette.requests import Request

from models.base import Model
from models.schema import ImageInput, Limits
from server import bodies
from server.errors import BadRequest, InvalidInput
from server.fetch import ForbiddenURL, Guard
from server.in_flight import SMALL
from server.inputs import Inputs, as_json
from server.jobs import Mode, Priority, Submission
from server.lifecycle import lifecycle, number
from server.quota import Quota
from server.turns import Turns

#: fal's smallest start deadline, in seconds.
MIN_START_TIMEOUT = 0.1
MAX_IDEMPOTENCY_KEY = 255
MAX_RUNNER_HINT = 255
MAX_WEBHOOK_URL = 2048
#: curl's -d says the second, some clients say nothing; the body is JSON all the same.
_JSON_TYPES = ("application/json", "application/x-www-form-urlencoded", "")


async def read(
    request: Request,
    body: bytes,
    model: Model,
    owner: str,
    *,
    mode: Mode,
    inputs: Inputs,
    quota: Quota,
    turns: Turns,
    content_type: str | None = None,
) -> Submission:
    """The submission in this request and its body, and what it names by address.

    `content_type` is the body's where that is not the request's own. Raises InvalidInput and BadRequest, naming the
    field and the limit, TooManyRequests, and DiskFull.
    """
    content_type = request.headers.get("content-type", "") if content_type is None else content_type
    given = (model, body, content_type, inputs.limits)
    # What is large takes long to read, and others are served meanwhile.
    fields, body_hash = await turns.run(owner, _read, *given) if len(body) > SMALL else _read(*given)
    # What was refused costs nothing; what brings files does, so this comes first.
    quota.take(owner)
    brought = await inputs.bring(fields, owner)
    is_queued = mode == Mode.QUEUE
    return Submission(
        endpoint=model.endpoint,
        owner=owner,
        input=as_json(fields, brought),
        inputs=brought,
        base_url=request.state.base_url,
        mode=mode,
        priority=_priority(request.headers),
        start_deadline=_start_deadline(request.headers),
        webhook_url=_webhook(request.query_params, inputs.guard) if is_queued else None,
        idempotency_key=_idempotency_key(request.headers) if is_queued else None,
        body_hash=body_hash,
        is_kept=request.headers.get("x-fal-store-io", "").strip() != "0",
        lifecycle=lifecycle(request.headers),
        max_queue_length=_max_queue_length(request.query_params),
        runner_hint=_runner_hint(request.headers),
    )


def _read(model: Model, body: bytes, content_type: str, limits: Limits) -> tuple[ImageInput, str]:
    """The fields, and what stands for the body."""
    return validate(model, body, content_type, limits), hashlib.sha256(body).hexdigest()


def validate(model: Model, body: bytes, content_type: str, limits: Limits) -> ImageInput:
    """The fields, with the seed fixed, so that a retry paints the same picture. Raises InvalidInput."""
    if content_type.partition(";")[0].strip().lower() not in _JSON_TYPES and not _is_json(content_type):
        message = f"Input should be a JSON object sent as application/json, not as {content_type[:100]}"
        raise InvalidInput([{"type": "model_attributes_type", "loc": ["body"], "msg": message, "input": ""}])
    fields = bodies.read(model.Input, body, {"limits": limits})
    # Below 2**32, because a larger number may be mangled on its way through JavaScript.
    seed = fields.seed if fields.seed is not None else secrets.randbelow(2**32)
    return fields.model_copy(update={"seed": seed})


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower().endswith("+json")


def _priority(headers: Mapping[str, str]) -> Priority:
    """fal ignores words it does not know; the header can only lower."""
    is_low = headers.get("x-fal-queue-priority", "").strip().lower() == Priority.LOW
    return Priority.LOW if is_low else Priority.NORMAL


def _start_deadline(headers: Mapping[str, str]) -> float | None:
    """When the request must have started, in seconds since 1970; the newer header's name wins."""
    text = headers.get("x-fal-request-start-timeout") or headers.get("x-fal-request-timeout")
    if text is None:
        return None
    seconds = number(text, "X-Fal-Request-Timeout")
    if seconds <= MIN_START_TIMEOUT:
        raise BadRequest(f"X-Fal-Request-Timeout should be greater than {MIN_START_TIMEOUT} seconds")
    return time.time() + seconds


def _webhook(parameters: Mapping[str, str], guard: Guard) -> str | None:
    url = parameters.get("fal_webhook")
    if not url:
        return None
    if len(url) > MAX_WEBHOOK_URL:
        message, loc = f"URL should have at most {MAX_WEBHOOK_URL} characters", ["query", "fal_webhook"]
        raise InvalidInput([{"type": "url_too_long", "loc": loc, "msg": message, "input": url[:1000]}])
    try:
        guard.check(url)
    except ForbiddenURL as error:
        entry = {"type": "value_error", "loc": ["query", "fal_webhook"], "msg": str(error), "input": url[:1000]}
        raise InvalidInput([entry]) from None
    return url


def _idempotency_key(headers: Mapping[str, str]) -> str | None:
    key = headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY:
        raise BadRequest(f"Idempotency-Key should have 1 to {MAX_IDEMPOTENCY_KEY} characters")
    return key


def _runner_hint(headers: Mapping[str, str]) -> str | None:
    hint = headers.get("x-fal-runner-hint")
    if hint is not None and len(hint) > MAX_RUNNER_HINT:
        raise BadRequest(f"X-Fal-Runner-Hint should have at most {MAX_RUNNER_HINT} characters")
    return hint


def _max_queue_length(parameters: Mapping[str, str]) -> int | None:
    text = parameters.get("fal_max_queue_length")
    if text is None:
        return None
    length = number(text, "fal_max_queue_length")
    if length < 1:
        raise BadRequest("fal_max_queue_length should be at least 1")
    return int(length)
