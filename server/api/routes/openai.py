"""OpenAI's images API on top of the queue: /v1/images/generations and /v1/models."""

import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json, to_json

from models.base import Model
from models.schema import PRESETS
from server.api import validation
from server.api.dependencies import (
    Services,
    authenticate,
    get_services,
    open_output,
    parse_request_body,
    receive_body,
    result_response_of,
)
from server.api.responses import FalJSONResponse, with_request_id
from server.api.sse import AbortStream, EventStream, wait_or_heartbeat
from server.api.wait import cancel_on_disconnect, wait_for_outcome
from server.errors import InternalError, InvalidInput, NotFound, ServerError, Unauthorized
from server.inputs.spool import SpooledBody
from server.queue.jobs import Job, Mode, Outcome, State, Submission

router = APIRouter(prefix="/v1", tags=["openai"])

DEFAULT_MODEL = "fal-ai/flux/dev"
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
#: OpenAI's names for fal's fields, so that an error names the field that the client sent.
_THEIR_NAMES = {"image_size": "size", "num_images": "n", "sync_mode": "response_format"}
#: Token counts of zero, because OpenAI's package requires token counts.
_NO_USAGE = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}


class ImagesRequest(BaseModel):
    """A request with OpenAI's fields. All other fields, such as seed or num_inference_steps, go to the model."""

    model_config = ConfigDict(extra="allow")

    prompt: str
    model: str | None = Field(None, max_length=255)
    n: int | None = Field(None, ge=1)
    size: str | None = None
    response_format: Literal["url", "b64_json"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    user: str | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The request, translated to the model's fields. Raises InvalidInput for an invalid size."""
        translated = {"prompt": self.prompt, "num_images": self.n, "image_size": _size(self.size)}
        # As at OpenAI, streams contain the images themselves instead of URLs.
        translated["sync_mode"] = bool(self.stream) or self.response_format == "b64_json"
        fields = {name: value for name, value in translated.items() if value is not None}
        return {**(self.model_extra or {}), **fields}


@router.get("/models")
async def models(request: Request) -> Response:
    """List the endpoints that are served, as OpenAI lists models."""
    try:
        authenticate(request)
        return FalJSONResponse(
            {"object": "list", "data": [_model(endpoint) for endpoint in get_services(request).models]}
        )
    except ServerError as error:
        return problem(error)


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """Describe one endpoint, as OpenAI describes a model."""
    try:
        authenticate(request)
        return FalJSONResponse(_model(_model_for(request, name).endpoint))
    except ServerError as error:
        return problem(error)


@router.post("/images/generations")
async def generations(request: Request) -> Response:
    """Generate images and return them; with `stream`, send events with previews and then the images."""
    services = get_services(request)
    try:
        body, submission = await _parse_generation(request)
        job = await services.executor.run(submission.owner, services.queue.submit, submission)
        if body.stream:
            events = _events(services, job, body.partial_images or 0)
            return with_request_id(EventStream(events, context=cancel_on_disconnect(services, job)), job)
        await wait_for_outcome(request, services, job)
        return with_request_id(await result_response_of(services, job, _answer, is_patient=True), job)
    except ServerError as error:
        return problem(error)


async def _parse_generation(request: Request) -> tuple[ImagesRequest, Submission]:
    """Parse the request into OpenAI's fields and a submission. Raises ServerError."""
    owner = authenticate(request)
    async with receive_body(request, owner) as body:
        fields = await get_services(request).executor.run(owner, _translate, body)
        model = _model_for(request, fields.model or DEFAULT_MODEL)
        mode = Mode.STREAM if fields.stream else Mode.RUN
        return fields, await parse_request_body(request, body, model, owner, mode, content_type="")


def _translate(body: SpooledBody) -> ImagesRequest:
    """Parse the body into OpenAI's fields, and replace the body's text by the model's fields. Raises InvalidInput."""
    fields = validation.parse_body(ImagesRequest, body.text)
    body.text = to_json(fields.fields)
    return fields


def problem(error: ServerError) -> Response:
    """Build an error response in OpenAI's shape, with 400 instead of 422 for invalid fields."""
    return FalJSONResponse(_problem(error), 400 if isinstance(error, InvalidInput) else error.status, error.headers)


def _problem(error: ServerError) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    body: dict[str, Any] = {"message": str(error), "type": kind, "param": None, "code": error.error_type}
    if isinstance(error, InvalidInput):
        return {"error": {**body, **_first(error.detail)}}
    if isinstance(error, Unauthorized):
        body["code"] = "invalid_api_key"
    if isinstance(error, NotFound):
        body |= {"code": "model_not_found", "param": "model"}
    return {"error": body}


def _first(detail: list[dict[str, Any]]) -> dict[str, Any]:
    """Describe the first of the wrong fields, because OpenAI's error names only one field."""
    entry = detail[0]
    names = [str(part) for part in entry["loc"] if part != "body"]
    names = [_THEIR_NAMES.get(name, name) for name in names[:1]] + names[1:]
    param = ".".join(names) or None
    return {"message": f"{param}: {entry['msg']}" if param else entry["msg"], "param": param, "code": entry["type"]}


def _size(size: str | None) -> str | dict[str, int] | None:
    """Parse a size: `auto` for the model's default, WIDTHxHEIGHT, or one of fal's presets. Raises InvalidInput."""
    if size is None or size == "auto":
        return None
    match = _SIZE.fullmatch(size)
    if not match and size not in PRESETS:
        message = f"Input should be auto, WIDTHxHEIGHT such as 1024x768, or one of {', '.join(PRESETS)}"
        raise InvalidInput([{"type": "value_error", "loc": ["body", "size"], "msg": message, "input": size[:100]}])
    return {"width": int(match[1]), "height": int(match[2])} if match else size


def _model_for(request: Request, name: str) -> Model:
    models = get_services(request).models
    if name not in models:
        raise NotFound(f"The model {name!r} does not exist; this server offers: {', '.join(sorted(models))}")
    return models[name]


def _model(endpoint: str) -> dict[str, Any]:
    return {"id": endpoint, "object": "model", "created": 0, "owned_by": endpoint.split("/")[0]}


def _answer(outcome: Outcome) -> FalJSONResponse:
    output = from_json(outcome.body)
    if outcome.status != 200:
        kind = "server_error" if outcome.status >= 500 else "invalid_request_error"
        message = outcome.error or "Internal Server Error"
        return FalJSONResponse(
            {"error": {"message": message, "type": kind, "param": None, "code": outcome.error_type}}, outcome.status
        )
    return FalJSONResponse({"created": int(time.time()), "data": [_datum(image["url"]) for image in output["images"]]})


def _datum(url: str) -> dict[str, str]:
    """Build an image's entry, with either `url` or `b64_json`; the other field is absent, not null."""
    return {"b64_json": _base64(url)} if url.startswith("data:") else {"url": url}


def _base64(data_uri: str) -> str:
    return data_uri.partition(",")[2]


async def _events(services: Services, job: Job, num_partial: int) -> AsyncIterator[Mapping[str, Any] | None]:
    """Yield up to `num_partial` partial images, evenly spread over the steps, then each final image.

    None stands for a heartbeat. After a failure, yields an error and raises AbortStream.
    """
    num_sent, last_preview = 0, None
    with services.notifier.subscribe(job.request_id) as event:
        while job.state != State.COMPLETED:
            event.clear()
            preview, is_due = job.preview, job.step * (num_partial + 1) >= (num_sent + 1) * job.num_steps
            if num_sent < num_partial and preview is not None and preview is not last_preview and is_due:
                yield _event("partial_image", _base64(preview), "jpeg", partial_image_index=num_sent)
                num_sent, last_preview = num_sent + 1, preview
            if services.notifier.is_closing:
                yield {"type": "error", **_problem(InternalError("The server is stopping."))}
                raise AbortStream
            if not await wait_or_heartbeat(event):
                yield None
    async with open_output(services, job) as (outcome, output):
        if outcome.status != 200:
            yield {"type": "error", **from_json(bytes(_answer(outcome).body))}
            raise AbortStream
        for image in output["images"]:
            kind = image["content_type"].removeprefix("image/")
            size = f"{image['width']}x{image['height']}"
            yield _event("completed", _base64(image["url"]), kind, size=size, usage=_NO_USAGE)


def _event(name: str, content: str, output_format: str, **more: Any) -> dict[str, Any]:
    """Build one of OpenAI's events; fields without a meaning here have OpenAI's defaults."""
    fields = {"created_at": int(time.time()), "size": "auto", "quality": "auto", "background": "opaque", **more}
    return {"type": f"image_generation.{name}", "b64_json": content, "output_format": output_format, **fields}
