"""Web pages: the playground with a form for every endpoint, the status page, and Swagger UI."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles

from models.schema import image_inputs
from server.api.dependencies import authenticate, get_services
from server.api.responses import FalJSONResponse

router = APIRouter(include_in_schema=False)
STATIC = Path(__file__).parents[2] / "static"
#: Headers of the pages. They keep the pages from loading anything from other hosts, and from sending anything there.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class _Files(StaticFiles):
    """Static files that browsers revalidate each time, so that a page never runs scripts of another version."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        """Return the file, or 304 if it has not changed."""
        response = super().file_response(*arguments, **options)
        response.headers.update({"cache-control": "no-cache", "x-content-type-options": "nosniff"})
        return response


files = GZipMiddleware(_Files(directory=STATIC))
#: Swagger UI's script and style, as packaged by fastapi-offline.
swagger = GZipMiddleware(_Files(packages=[("fastapi_offline", "static")]))


@router.api_route("/", methods=["GET", "HEAD"])
async def page() -> Response:
    """Return the playground."""
    return FileResponse(STATIC / "index.html", headers=_HEADERS)


@router.api_route("/status", methods=["GET", "HEAD"])
async def status() -> Response:
    """Return the operator's status page."""
    return FileResponse(STATIC / "status.html", headers=_HEADERS)


@router.api_route("/docs", methods=["GET", "HEAD"])
async def docs() -> Response:
    """Return Swagger UI for /openapi.json.

    Swagger UI's script is served locally, because it can read the key that the playground stores in the browser.
    """
    return FileResponse(STATIC / "docs.html", headers=_HEADERS)


@router.get("/playground.json")
async def playground_config(request: Request) -> Response:
    """Return the playground's configuration, which is public like llms.txt."""
    services = get_services(request)
    inputs = {endpoint: list(image_inputs(model.Input)) for endpoint, model in services.models.items()}
    return FalJSONResponse(
        {
            "endpoints": list(services.models),
            "image_inputs": {endpoint: paths for endpoint, paths in inputs.items() if paths},
            "strength": [
                endpoint for endpoint, model in services.models.items() if "strength" in model.Input.model_fields
            ],
            "image_to_image": [
                endpoint
                for endpoint, model in services.models.items()
                if {"image_url", "strength"} <= model.Input.model_fields.keys()
                and "mask_url" not in model.Input.model_fields
            ],
            "needs_key": not services.keys.allows_anonymous,
        }
    )


@router.get("/playground/steps.json")
async def step_times(request: Request) -> Response:
    """Return the mean times of a step since the start, from which the playground estimates how long requests take."""
    authenticate(request)
    return FalJSONResponse({"steps": get_services(request).metrics.steps()})
