"""The parsing of HTTP requests into submissions: the body's fields, and fal's headers and parameters."""

import secrets

from starlette.requests import Request

from models.base import Model
from models.image_size import Limits
from models.schema import ImageInput
from server.api import validation
from server.api.headers import (
    idempotency_key,
    lifecycle,
    max_queue_length,
    priority,
    runner_hint,
    start_deadline,
    webhook_url,
)
from server.api.rate_limit import RateLimiter
from server.errors import InvalidInput
from server.executor import FairExecutor
from server.inputs.resolver import InputResolver, dump_input
from server.inputs.spool import Spool
from server.net.bytes_in_flight import SMALL
from server.queue.jobs import Mode, Submission

#: Accepted content types of JSON bodies, in addition to all that end in +json. `curl -d` sends the second, and some
#: clients send none.
_JSON_TYPES = ("application/json", "application/x-www-form-urlencoded", "")


async def parse_submission(
    request: Request,
    body: Spool,
    model: Model,
    owner: str,
    *,
    mode: Mode,
    inputs: InputResolver,
    rate_limiter: RateLimiter,
    executor: FairExecutor,
    content_type: str | None = None,
) -> Submission:
    """Parse the request and its body into a submission, and fetch the files that its URLs refer to.

    `content_type` overrides the request's header. Raises InvalidInput and BadRequest, naming the field and the limit,
    TooManyRequests, QueueFull, DiskFull, and InternalError if a file could not be checked.
    """
    content_type = request.headers.get("content-type", "") if content_type is None else content_type
    args = (model, body.text, content_type, inputs.limits)
    # A thread parses large bodies, because the event loop must serve other requests meanwhile.
    fields = await executor.run(owner, validate, *args) if len(body.text) > SMALL else validate(*args)
    # The rate limit comes after validation, because invalid requests do not count, and before the fetching of inputs,
    # because that is expensive.
    rate_limiter.acquire(owner)
    input_files = await inputs.resolve(fields, owner, body)
    is_queued = mode == Mode.QUEUE
    return Submission(
        endpoint=model.endpoint,
        owner=owner,
        input=dump_input(fields, input_files, body),
        input_files=input_files,
        base_url=request.state.base_url,
        mode=mode,
        priority=priority(request.headers),
        start_deadline=start_deadline(request.headers),
        webhook_url=webhook_url(request.query_params, inputs.outbound) if is_queued else None,
        idempotency_key=idempotency_key(request.headers) if is_queued else None,
        body_hash=body.hash,
        store_io=request.headers.get("x-fal-store-io", "").strip() != "0",
        lifecycle=lifecycle(request.headers),
        max_queue_length=max_queue_length(request.query_params),
        runner_hint=runner_hint(request.headers),
    )


def validate(model: Model, body: bytes, content_type: str, limits: Limits) -> ImageInput:
    """Validate the body, and return its fields. Raises InvalidInput.

    If the seed is missing, choose one now, so that a retry makes the same image.
    """
    if content_type.partition(";")[0].strip().lower() not in _JSON_TYPES and not _is_json(content_type):
        message = f"Input should be a JSON object sent as application/json, not as {content_type[:100]}"
        raise InvalidInput.of("model_attributes_type", ("body",), message)
    fields = validation.parse_body(model.Input, body, {"limits": limits})
    # The seed is below 2**32, because JavaScript rounds integers above 2**53.
    seed = fields.seed if fields.seed is not None else secrets.randbelow(2**32)
    return fields.model_copy(update={"seed": seed})


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower().endswith("+json")
