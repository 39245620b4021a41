"""Descriptions of the endpoints, under the same paths as at fal."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from server.api import fal_openapi
from server.api.dependencies import get_model
from server.api.llms_txt import render_llms_txt
from server.api.responses import FalJSONResponse

router = APIRouter(tags=["catalog"])


@router.get("/api/openapi/queue/openapi.json")
async def queue_openapi(request: Request, endpoint_id: str = "") -> Response:
    """Return the OpenAPI document of one endpoint's queue."""
    return FalJSONResponse(fal_openapi.queue_openapi(get_model(request, endpoint_id), request.state.base_url))


@router.get("/models/{endpoint:path}/llms.txt")
async def llms_txt(request: Request, endpoint: str) -> Response:
    """Return a Markdown description of the endpoint for language models."""
    text = render_llms_txt(get_model(request, endpoint), request.state.base_url)
    return PlainTextResponse(text, media_type="text/markdown")
