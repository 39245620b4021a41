"""OpenAI's images API on top of the queue: generations, edits, variations and models, under /v1."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Request, Response
from pydantic_core import to_json
from starlette.routing import Match, Route

from server.api import validation
from server.api.dependencies import (
    authenticate,
    get_services,
    parse_request_body,
    receive_body,
    receive_form,
)
from server.api.openai.requests import CommonRequest, ImagesRequest, VariationRequest, translate_form
from server.api.openai.responses import events, images_response
from server.api.operations import ERRORS, content, form_body, json_body
from server.api.responses import FalJSONResponse, with_request_id
from server.api.schemas.errors import OpenAIProblem
from server.api.schemas.openai import OpenAIImages, OpenAIModel, OpenAIModels
from server.api.sse import EventStream
from server.api.wait import cancel_on_disconnect, response_when_done
from server.errors import NotFound
from server.queue.jobs import Mode, Submission

#: The errors, in OpenAI's shape and with its statuses.
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": OpenAIProblem,
        "description": "The request was refused: 400 for invalid fields, 401 without a valid key, 404 for an unknown "
        "model, 413 for a body that is too large, 429 when a limit is reached.",
    },
    "5XX": {**ERRORS["5XX"], "model": OpenAIProblem},
}
router = APIRouter(prefix="/v1", tags=["openai"], responses=_ERRORS)

_IMAGES: dict[str, Any] = {
    "response_model": OpenAIImages,
    "response_description": "The images. With `stream`, events with previews and images as JSON.",
    "responses": {200: content("text/event-stream")},
}
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


@router.get("/models", summary="List the models", response_model=OpenAIModels)
async def models(request: Request) -> Response:
    """List the names of the models that are served, as OpenAI lists models."""
    authenticate(request)
    return FalJSONResponse(OpenAIModels(object="list", data=[_model(request, name) for name in _names(request)]))


@router.get("/models/{name:path}", summary="Get a model", response_model=OpenAIModel)
async def model(
    request: Request, name: Annotated[str, Path(description="The name of the model.", examples=["gpt-image-1"])]
) -> Response:
    """Describe one model, as OpenAI does."""
    authenticate(request)
    return FalJSONResponse(_model(request, name))


@router.post(
    "/images/generations",
    summary="Generate images from a prompt",
    openapi_extra=json_body(ImagesRequest),
    **_IMAGES,
)
async def generations(request: Request) -> Response:
    """Generate images and return them; with `stream`, send events with previews and then the images."""
    services, owner = get_services(request), authenticate(request)
    async with receive_body(request, owner) as body:
        sent = await services.executor.run(owner, validation.parse_body, ImagesRequest, body.text)
        wanted = services.model_names.find(sent.model)
        body.text = to_json(sent.fields)
        submission = await parse_request_body(request, body, wanted, owner, _mode(sent), content_type="")
    return await _respond(request, submission, sent)


@router.post(
    "/images/edits",
    summary="Change an image",
    openapi_extra=form_body(ImagesRequest, "image", "mask"),
    **_IMAGES,
)
async def edits(request: Request) -> Response:
    """Edit the image of a form: repaint where its mask is transparent, or without a mask, change the whole image."""
    return await _change(request, ImagesRequest)


@router.post(
    "/images/variations",
    summary="Generate variations of an image",
    openapi_extra=form_body(VariationRequest, "image"),
    **_IMAGES,
)
async def variations(request: Request) -> Response:
    """Generate variations of the image of a form."""
    return await _change(request, VariationRequest)


@router.api_route("", methods=_METHODS, include_in_schema=False)
@router.api_route("/{path:path}", methods=_METHODS, include_in_schema=False)
async def unknown(request: Request) -> Response:
    """Refuse an unknown path, or an unknown method of a path, which would otherwise count as an endpoint of fal's.

    Raises NotFound and HTTPException.
    """
    partial_matches = [route for route in router.routes if route.matches(request.scope)[0] == Match.PARTIAL]
    allowed = {method for route in partial_matches if isinstance(route, Route) for method in route.methods or ()}
    if allowed:
        raise HTTPException(405, headers={"allow": ", ".join(sorted(allowed))})
    raise NotFound(f"Path {request.url.path} not found")


async def _change(request: Request, kind: type[CommonRequest]) -> Response:
    services, owner = get_services(request), authenticate(request)
    async with receive_form(request, owner) as form:
        sent = await services.executor.run(owner, validation.parse_body, kind, form.text)
        suitable = translate_form(form, sent, services.model_names, services.inputs.limits)
        submission = await parse_request_body(request, form, suitable, owner, _mode(sent), content_type="")
    return await _respond(request, submission, sent)


def _mode(sent: CommonRequest) -> Mode:
    return Mode.STREAM if sent.is_streamed else Mode.RUN


async def _respond(request: Request, submission: Submission, sent: CommonRequest) -> Response:
    """Submit a job, and respond with its images, or with events."""
    services, path = get_services(request), request.url.path
    job = await services.executor.run(submission.owner, services.queue.submit, submission)
    if isinstance(sent, ImagesRequest) and sent.stream:
        stream = events(services, job, path, sent.partial_images or 0, sent.encoding)
        return with_request_id(EventStream(stream, context=cancel_on_disconnect(services, job)), job)
    return await response_when_done(request, job, partial(images_response, path=path, encoding=sent.encoding))


def _names(request: Request) -> list[str]:
    return get_services(request).model_names.names()


def _model(request: Request, name: str) -> OpenAIModel:
    owner = get_services(request).model_names.find(name).endpoint.split("/")[0]
    return OpenAIModel(id=name, object="model", created=0, owned_by=owner)
