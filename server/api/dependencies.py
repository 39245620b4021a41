"""Dependencies of the routes: the server's services, the caller, the model of an endpoint, and its jobs."""

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
from server.inputs.spool import SpooledBody
from server.metrics import Metrics
from server.net.bytes_in_flight import SMALL, BytesInFlight
from server.net.fair_share import FairShare
from server.queue.history import HistoryQuery
from server.queue.jobs import Job, Mode, Outcome, Submission
from server.queue.notifier import Notifier
from server.queue.queue import Queue
from server.queue.retention import Retention
from server.queue.usage import UsageFilter, UsageRow
from server.status import GpuStatus
from server.storage.file_store import DISK_FULL_ERRNOS, FileStore, disk_error
from server.storage.uploads import Uploads
from server.webhooks.signing import WebhookSigner

TOO_MANY_OPEN = (
    "Limit of open responses reached: one key may use half of --max-connections, and less while other keys are active; "
    "close some responses first"
)
#: How much of a long body is read at a time.
_BODY_PART = 2**18


@dataclass(frozen=True)
class Services:
    """The services of one server, which `components.py` builds."""

    models: Mapping[str, Model]
    #: Known endpoints that are not served, with the weights that they need.
    unavailable_endpoints: Mapping[str, str]
    keys: Keys
    inputs: InputResolver
    in_flight: BytesInFlight
    #: Responses that stay open as long as a request runs.
    open_answers: FairShare
    #: Threads for database access.
    executor: FairExecutor
    rate_limiter: RateLimiter
    queue: Queue
    files: FileStore
    uploads: Uploads
    retention: Retention
    signer: WebhookSigner
    notifier: Notifier
    metrics: Metrics
    #: Finished requests of a key; blocks on the disk.
    history: Callable[[HistoryQuery], Mapping[str, Any]]
    #: Usage of a key; blocks on the disk.
    usage: Callable[[UsageFilter], Sequence[UsageRow]]
    #: Data of /status; blocks on the disk.
    overview: Callable[[], Mapping[str, Any]]
    #: Whether the models can generate images, and the progress of loading.
    readiness: Callable[[], tuple[bool, LoadProgress]]
    #: The state of each GPU and of the engines in its memory.
    gpus: Callable[[], Sequence[GpuStatus]]


def get_services(request: Request) -> Services:
    """Return the services of the server that handles this request."""
    return cast(Services, request.app.state.services)


def authenticate(request: Request, scope: str | None = None) -> str:
    """Return the owner of the request's key, or of its token with this scope. Raises Unauthorized."""
    return get_services(request).keys.owner(request.headers.get("authorization"), scope)


def authenticate_with_token(connection: HTTPConnection, endpoint: str) -> str:
    """Return the caller of an endpoint that also accepts `?fal_jwt_token=`, for browsers. Raises Unauthorized."""
    keys = cast(Services, connection.app.state.services).keys
    token = connection.query_params.get("fal_jwt_token")
    if token:
        return keys.owner_of_token(token, app_alias(endpoint))
    return keys.owner(connection.headers.get("authorization"), app_alias(endpoint))


def app_alias(endpoint: str) -> str:
    """Return the name of an endpoint's app in a token's scope: "flux" for fal-ai/flux/dev."""
    return endpoint.split("/")[1]


def get_model(request: Request, endpoint: str) -> Model:
    """Return the model served under this id. Raises NotFound with fal's messages."""
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
    """Return the job if it belongs to this owner and app (two-segment or full id). Raises NotFound."""
    if job is None or job.owner != owner:
        raise NotFound
    if app != job.endpoint and app != "/".join(job.endpoint.split("/")[:2]):
        raise NotFound
    return job


@asynccontextmanager
async def receive_body(request: Request, owner: str) -> AsyncIterator[SpooledBody]:
    """Read the body of a request for images; its temporary files exist until the block ends.

    Raises InvalidInput, TooManyRequests, BodyTooLarge and DiskFull.
    """
    services = get_services(request)
    body, part = SpooledBody(services.inputs.cache.temp_path), bytearray()
    try:
        async with services.in_flight.stream(request, owner) as received:
            async for each in received:
                part += each
                if len(part) >= _BODY_PART:
                    # Threads decode and write long bodies while the event loop serves other requests.
                    await services.executor.run(owner, body.write, bytes(part))
                    part.clear()
            if len(part) > SMALL:
                await services.executor.run(owner, body.write, bytes(part))
            else:
                body.write(bytes(part))
            body.finish()
            yield body
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise disk_error(error) from error
        raise
    finally:
        body.close()


async def parse_request(request: Request, model: Model, owner: str, mode: Mode) -> Submission:
    """Read the body and parse the request into a submission.

    Raises as `receive_body` and `submissions.parse_submission` do.
    """
    async with receive_body(request, owner) as body:
        return await parse_request_body(request, body, model, owner, mode)


async def parse_request_body(
    request: Request, body: SpooledBody, model: Model, owner: str, mode: Mode, content_type: str | None = None
) -> Submission:
    """Parse a request whose body is already read. Raises as `submissions.parse_submission` does."""
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
    """Build a response once there is room in memory for it; it counts towards its owner's share until it is sent.

    A client that does not read its responses therefore cannot fill the memory. `read` is called in a thread. Without
    room, raises TooManyRequests, or waits if `is_patient`.
    """
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(services.in_flight.room(owner, num_bytes, is_patient=is_patient))
        response = await services.executor.run(owner, read)
        response.room = stack.pop_all()
        return response


async def result_response_of(
    services: Services, job: Job, render: Callable[[Outcome], FalJSONResponse], *, is_patient: bool = False
) -> FalJSONResponse:
    """Build the response of a completed job. Raises as `read_when_room`, and NotFound if the job was deleted."""

    def read() -> FalJSONResponse:
        return render(services.queue.result(job))

    return await read_when_room(services, job.owner, job.output_size, read, is_patient=is_patient)


@asynccontextmanager
async def open_output(services: Services, job: Job) -> AsyncIterator[tuple[Outcome, Any]]:
    """Yield the outcome of a completed job and its parsed body, which count towards the owner's share of memory.

    Waits until there is room. Raises NotFound if the job was deleted in the meantime.
    """

    def read() -> tuple[Outcome, Any]:
        outcome = services.queue.result(job)
        return outcome, from_json(outcome.body)

    async with services.in_flight.room(job.owner, job.output_size, is_patient=True):
        yield await services.executor.run(job.owner, read)
