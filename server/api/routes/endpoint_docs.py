"""Descriptions of the endpoints, under the same paths as at fal."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import PlainTextResponse

from server.api import fal_openapi
from server.api.dependencies import get_model
from server.api.llms_txt import render_llms_txt
from server.api.operations import PUBLIC, content, parameter
from server.api.responses import FalJSONResponse

router = APIRouter(tags=["catalog"])


Endpoint = Annotated[str, Path(description="The endpoint.", examples=["fal-ai/flux/dev"])]
#: The handler reads this parameter itself, because it answers 404, as for an unknown endpoint, if it is missing.
_ENDPOINT_ID = parameter(
    "query",
    "endpoint_id",
    {"type": "string", "description": "The endpoint.", "examples": ["fal-ai/flux/dev"]},
    is_required=True,
)


@router.api_route("/openapi.json", methods=["GET", "HEAD"], include_in_schema=False)
async def openapi(request: Request) -> Response:
    """Return the OpenAPI document of the whole server, under the URL by which the client reached the server."""
    return FalJSONResponse({**request.app.openapi(), "servers": [{"url": request.state.base_url}]})


@router.get(
    "/api/openapi/queue/openapi.json",
    summary="Get the OpenAPI document of an endpoint's queue",
    response_model=dict[str, Any],
    response_description="An OpenAPI 3.0 document.",
    openapi_extra={**PUBLIC, "parameters": [_ENDPOINT_ID]},
)
async def queue_openapi(request: Request) -> Response:
    """Return the OpenAPI document of one endpoint's queue."""
    model = get_model(request, request.query_params.get("endpoint_id", ""))
    return FalJSONResponse(fal_openapi.queue_openapi(model, request.state.base_url))


@router.get(
    "/models/{endpoint:path}/llms.txt",
    summary="Get the description of an endpoint for language models",
    response_class=Response,
    response_description="A Markdown document.",
    responses={200: content("text/markdown")},
    openapi_extra=PUBLIC,
)
async def llms_txt(request: Request, endpoint: Endpoint) -> Response:
    """Return a Markdown description of the endpoint for language models."""
    text = render_llms_txt(get_model(request, endpoint), request.state.base_url)
    return PlainTextResponse(text, media_type="text/markdown")
