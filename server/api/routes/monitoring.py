"""Routes for monitoring: health, readiness, status and metrics."""

import asyncio
from dataclasses import asdict
from importlib.metadata import version

from fastapi import APIRouter, Request, Response

from server.api.dependencies import get_services
from server.api.responses import FalJSONResponse
from server.metrics import CONTENT_TYPE

router = APIRouter(tags=["operations"])
VERSION = version("flux-server")


@router.get("/health")
async def health() -> Response:
    """Report that the server is alive, whether or not the models are ready."""
    return FalJSONResponse({"status": "alive", "version": VERSION})


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """Return 200 if a model can generate images, otherwise 503. The server accepts requests while it loads weights."""
    if get_services(request).notifier.is_stopping:
        return FalJSONResponse({"status": "stopping", "version": VERSION}, 503)
    is_ready, loading = get_services(request).readiness()
    if is_ready:
        return FalJSONResponse({"status": "ready", "version": VERSION})
    return FalJSONResponse({"status": "loading", "version": VERSION, **asdict(loading)}, 503)


@router.get("/status.json")
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


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus. If the server has keys, this requires an operator's key."""
    services = get_services(request)
    services.keys.require_operator(request.headers.get("authorization"))
    return Response(await asyncio.to_thread(services.metrics.text), media_type=CONTENT_TYPE)
