"""The pages: every endpoint as a form, its requests as they are painted; the operator's view; Swagger UI."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

from server.api.dependencies import get_services
from server.api.responses import FalJSONResponse

router = APIRouter(include_in_schema=False)
STATIC = Path(__file__).parents[2] / "static"
#: Nothing of the pages comes from elsewhere, and nothing goes elsewhere.
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
    """Asked for anew each time, so that a page never runs with the scripts of another version."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        """The file, or that it is still the same."""
        response = super().file_response(*arguments, **options)
        response.headers.update({"cache-control": "no-cache", "x-content-type-options": "nosniff"})
        return response


files = _Files(directory=STATIC)
#: Swagger UI's own script and style, as fastapi-offline brings them.
swagger = _Files(packages=[("fastapi_offline", "static")])


@router.api_route("/", methods=["GET", "HEAD"])
async def page() -> Response:
    """The playground."""
    return FileResponse(STATIC / "index.html", headers=_HEADERS)


@router.api_route("/status", methods=["GET", "HEAD"])
async def status() -> Response:
    """The operator's view."""
    return FileResponse(STATIC / "status.html", headers=_HEADERS)


@router.api_route("/docs", methods=["GET", "HEAD"])
async def docs() -> Response:
    """Swagger UI on /openapi.json. Its script comes from this server: it runs where the playground keeps the key."""
    return FileResponse(STATIC / "docs.html", headers=_HEADERS)


@router.get("/playground.json")
async def playground_config(request: Request) -> Response:
    """What the page needs to know of this server; no secret, as llms.txt is none."""
    services = get_services(request)
    return FalJSONResponse(
        {
            "endpoints": list(services.models),
            "paint_over": [
                endpoint
                for endpoint, model in services.models.items()
                if {"image_url", "strength"} <= model.Input.model_fields.keys()
            ],
            "needs_key": not services.keys.allows_anonymous,
        }
    )
