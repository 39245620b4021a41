"""The routes, one file a noun; what they need of the server is in `Parts`."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

from pydantic_core import from_json
from starlette.requests import HTTPConnection, Request

from models.base import LoadProgress, Model
from server.api import submissions
from server.api.rate_limit import RateLimiter
from server.api.responses import FalJSONResponse
from server.auth import Keys
from server.errors import NotFound, not_offered
from server.executor import FairExecutor
from server.inputs.resolver import InputResolver
from server.metrics import Metrics
from server.net.bytes_in_flight import BytesInFlight
from server.net.fair_share import FairShare
from server.queue.history import HistoryQuery
from server.queue.jobs import Job, Mode, Outcome, Submission
from server.queue.notifier import Notifier
from server.queue.queue import Queue
from server.queue.retention import Retention
from server.queue.usage import UsageFilter, UsageRow
from server.status import GpuStatus
from server.storage.file_store import FileStore
from server.storage.uploads import Uploads
from server.webhooks.signing import WebhookSigner

TOO_MANY_OPEN = (
    "This key has as many answers open as it may, half of --max-connections, or less beside others; end some first"
)


@dataclass(frozen=True)
class Services:
    """The parts of one server, joined in `app.py`."""

    models: Mapping[str, Model]
    #: Endpoints that could be served and are not, and the weights that they need.
    unavailable_endpoints: Mapping[str, str]
    keys: Keys
    inputs: InputResolver
    in_flight: BytesInFlight
    #: Answers that wait or go on for as long as a request does.
    open_answers: FairShare
    #: For what waits for the database.
    executor: FairExecutor
    rate_limiter: RateLimiter
    queue: Queue
    files: FileStore
    uploads: Uploads
    retention: Retention
    signer: WebhookSigner
    notifier: Notifier
    metrics: Metrics
    #: What a key has asked for; waits for the disk.
    history: Callable[[HistoryQuery], Mapping[str, Any]]
    #: What a key has used; waits for the disk.
    usage: Callable[[UsageFilter], Sequence[UsageRow]]
    #: What the operator sees at a glance; waits for the disk.
    overview: Callable[[], Mapping[str, Any]]
    #: Whether the models can paint, and how far loading has come.
    readiness: Callable[[], tuple[bool, LoadProgress]]
    #: What there is to tell of each GPU, and of the engines in its memory.
    gpus: Callable[[], Sequence[GpuStatus]]


def get_services(request: Request) -> Services:
    """The parts of the server that this request came to."""
    return cast(Services, request.app.state.services)


def authenticate(request: Request, scope: str | None = None) -> str:
    """Who is calling, by key, or by a token of this scope. Raises Unauthorized."""
    return get_services(request).keys.owner(request.headers.get("authorization"), scope)


def authenticate_with_token(connection: HTTPConnection, endpoint: str) -> str:
    """Who is calling an endpoint that browsers call, by `?fal_jwt_token=` or as everywhere. Raises Unauthorized."""
    keys = cast(Services, connection.app.state.services).keys
    token = connection.query_params.get("fal_jwt_token")
    if token:
        return keys.owner_of_token(token, app_alias(endpoint))
    return keys.owner(connection.headers.get("authorization"), app_alias(endpoint))


def app_alias(endpoint: str) -> str:
    """What a token names an endpoint by: "flux" for fal-ai/flux/dev."""
    return endpoint.split("/")[1]


def get_model(request: Request, endpoint: str) -> Model:
    """The model served under this id. Raises NotFound in fal's words."""
    models = get_services(request).models
    if endpoint in models:
        return models[endpoint]
    if endpoint in get_services(request).unavailable_endpoints:
        raise NotFound(
            f"{endpoint} is not served here: it needs {get_services(request).unavailable_endpoints[endpoint]}"
        )
    if request.state.fal_url and endpoint.startswith("platform/"):
        raise not_offered(request.state.fal_url)
    if endpoint.startswith("v1/"):
        raise NotFound(f"Path /{endpoint} not found")
    app = next((known for known in models if endpoint.startswith(f"{known}/")), None)
    if app is not None:
        raise NotFound(f"Path {endpoint.removeprefix(app)} not found")
    offered = ", ".join(sorted(models))
    raise NotFound(f"Application {endpoint!r} not found: it is not offered by this server, which has {offered}")


def require_owned_job(job: Job | None, owner: str, app: str) -> Job:
    """The job, if it is this caller's and of this app (two-segment or full id). Raises NotFound."""
    if job is None or job.owner != owner:
        raise NotFound
    if app != job.endpoint and app != "/".join(job.endpoint.split("/")[:2]):
        raise NotFound
    return job


async def parse_request(request: Request, model: Model, owner: str, mode: Mode) -> Submission:
    """What a request asks for. Raises as `submissions.read` does."""
    async with get_services(request).in_flight.body(request, owner) as body:
        return await parse_request_body(request, body, model, owner, mode)


async def parse_request_body(
    request: Request, body: bytes, model: Model, owner: str, mode: Mode, content_type: str | None = None
) -> Submission:
    """The same for a body that is here already. Raises as `submissions.read` does."""
    services = get_services(request)
    return await submissions.parse_submission(
        request,
        body,
        model,
        owner,
        mode=mode,
        content_type=content_type,
        inputs=services.inputs,
        rate_limiter=services.rate_limiter,
        executor=services.executor,
    )


async def read_when_room(
    services: Services, owner: str, num_bytes: int, read: Callable[[], FalJSONResponse], *, is_patient: bool = False
) -> FalJSONResponse:
    """An answer that is read once there is room for it, and counts as its owner's until it is sent.

    A client that reads nothing fills no memory, however often it asks. `read` is called in a thread. Raises
    TooManyRequests where there is no room, unless `is_patient`.
    """
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(services.in_flight.room(owner, num_bytes, is_patient=is_patient))
        response = await services.executor.run(owner, read)
        response.room = stack.pop_all()
        return response


async def result_response_of(
    services: Services, job: Job, shown: Callable[[Outcome], FalJSONResponse], *, is_patient: bool = False
) -> FalJSONResponse:
    """How a completed job ended. Raises as `read_within`, and NotFound when it was forgotten meanwhile."""

    def read() -> FalJSONResponse:
        return shown(services.queue.result(job))

    return await read_when_room(services, job.owner, job.output_size, read, is_patient=is_patient)


@asynccontextmanager
async def open_output(services: Services, job: Job) -> AsyncIterator[tuple[Outcome, Any]]:
    """How a completed job ended, and its answer as an object; both count as its owner's while the block lasts.

    Waits until there is room. Raises NotFound when it was forgotten meanwhile.
    """

    def read() -> tuple[Outcome, Any]:
        outcome = services.queue.result(job)
        return outcome, from_json(outcome.body)

    async with services.in_flight.room(job.owner, job.output_size, is_patient=True):
        yield await services.executor.run(job.owner, read)
