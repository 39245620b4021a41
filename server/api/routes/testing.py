"""Controls for an application's tests: faults for the next requests, and the requests made. Off without --testing."""

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict
from starlette.responses import FileResponse

from server.api import validation
from server.api.dependencies import Services, authenticate, get_services, receive_body
from server.api.responses import FalJSONResponse
from server.errors import InvalidInput, NotFound
from server.testing.fault import Fault
from server.testing.fault_queue import FaultQueue

router = APIRouter(prefix="/testing", include_in_schema=False)


class _Hold(BaseModel):
    """The body of a release: the id of one fault, or none for all holds."""

    model_config = ConfigDict(extra="forbid")

    id: str = ""


@router.post("/next")
async def plan_fault(request: Request) -> Response:
    """Plan a fault for the caller's next requests; respond with its id."""
    services, owner = get_services(request), authenticate(request)
    fault = await _body(request, owner, Fault)
    if fault.endpoint and fault.endpoint not in services.models:
        message = f"Unknown endpoint; this server has {', '.join(sorted(services.models))}"
        raise InvalidInput.of("value_error", ("body", "endpoint"), message, fault.endpoint)
    return FalJSONResponse({"id": await services.executor.run(owner, _faults(services).plan, owner, fault)})


@router.get("/requests")
async def list_requests(request: Request) -> Response:
    """List the caller's requests since the last reset, oldest first."""
    services, owner = get_services(request), authenticate(request)
    return FalJSONResponse({"requests": await services.executor.run(owner, _faults(services).requests, owner)})


@router.post("/release")
async def release(request: Request) -> Response:
    """End all holds of the caller, or the one with the given id; respond with the number of requests released."""
    services, owner = get_services(request), authenticate(request)
    hold = await _body(request, owner, _Hold)
    released = await services.executor.run(owner, _faults(services).release_held, owner, hold.id)
    return FalJSONResponse({"released": released})


@router.post("/reset")
async def reset(request: Request) -> Response:
    """Delete the caller's faults and records, and cancel its unfinished requests."""
    services, owner = get_services(request), authenticate(request)
    await services.executor.run(owner, _faults(services).reset, owner)
    return FalJSONResponse({})


@router.get("/environment")
async def environment(request: Request) -> Response:
    """Return the environment variables that point clients here, with the caller's key, and the settings behind them."""
    authenticate(request)
    key = request.headers.get("authorization", "").partition(" ")[2].strip()
    variables = dict(request.app.state.client_variables)
    if key:
        variables |= dict.fromkeys(("FAL_KEY", "OPENAI_API_KEY"), key)
    return FalJSONResponse({"variables": variables, "settings": request.app.state.client_settings})


@router.get("/certificates")
async def certificates(request: Request) -> Response:
    """Return the certificates that clients need, as PEM, for tests outside the server's container."""
    authenticate(request)
    if not (path := request.app.state.client_variables.get("SSL_CERT_FILE")):
        raise NotFound("This server has no certificate, because --tls-port is 0")
    return FileResponse(path, media_type="application/x-pem-file")


def _faults(services: Services) -> FaultQueue:
    assert isinstance(services.queue, FaultQueue)
    return services.queue


async def _body(request: Request, owner: str, kind: type[validation.Body]) -> validation.Body:
    """Parse the body; an empty one counts as {}. Raises InvalidInput, naming each wrong field."""
    async with receive_body(request, owner) as body:
        return validation.parse_body(kind, body.text or b"{}")
