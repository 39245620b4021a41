"""Routes for monitoring: health, readiness, status and metrics."""

import asyncio
from dataclasses import asdict
from importlib.metadata import version

from fastapi import APIRouter, Request, Response

from server.api.dependencies import get_services
from server.api.operations import PUBLIC, content
from server.api.responses import FalJSONResponse
from server.api.schemas.monitoring import Health, Readiness, ServerStatus
from server.metrics import CONTENT_TYPE

router = APIRouter(tags=["operations"])
VERSION = version("flux-server")


@router.get("/health", summary="Check that the server is alive", response_model=Health, openapi_extra=PUBLIC)
async def health() -> Response:
    """Report that the server is alive, whether or not the models are ready."""
    return FalJSONResponse(Health(status="alive", version=VERSION))


@router.get(
    "/health/ready",
    summary="Check that the server can generate images",
    response_model=Readiness,
    response_description="The server can generate images.",
    responses={503: {"model": Readiness, "description": "The server loads weights, or stops."}},
    openapi_extra=PUBLIC,
)
async def ready(request: Request) -> Response:
    """Return 200 if a model can generate images, otherwise 503. The server accepts requests while it loads weights."""
    if get_services(request).notifier.is_stopping:
        return FalJSONResponse(Readiness(status="stopping", version=VERSION), 503)
    is_ready, loading = get_services(request).readiness()
    if is_ready:
        return FalJSONResponse(Readiness(status="ready", version=VERSION))
    return FalJSONResponse({"status": "loading", "version": VERSION, **asdict(loading)}, 503)


@router.get("/status.json", summary="Get the data of the status page", response_model=ServerStatus)
async def status(request: Request) -> Response:
    """Return the data of the status page. If the server has keys, this requires an operator's key."""
    services = get_services(request)
    services.keys.require_operator(request.headers.get("authorization"))
    is_ready, loading = services.readiness()
    overview = await asyncio.to_thread(services.overview)
    gauges = {name: value for name, (_, value) in (await asyncio.to_thread(services.metrics.gauges)).items()}
    progress = None if is_ready else asdict(loading)
    # In a thread, because a hanging GPU driver must not block the event loop.
    gpus = [asdict(gpu) for gpu in await asyncio.to_thread(services.gpus)]
    about = {"version": VERSION, "is_ready": is_ready, "loading": progress, "served": list(services.models)}
    return FalJSONResponse({**about, "now": gauges, "gpus": gpus, "steps": services.metrics.steps(), **overview})


@router.get(
    "/metrics",
    summary="Get the metrics for Prometheus",
    response_class=Response,
    response_description="Metrics in Prometheus' text format.",
    responses={200: content("text/plain")},
)
async def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus. If the server has keys, this requires an operator's key."""
    services = get_services(request)
    services.keys.require_operator(request.headers.get("authorization"))
    return Response(await asyncio.to_thread(services.metrics.text), media_type=CONTENT_TYPE)
