"""Functions that routes share: finding services, callers, models and jobs; reading bodies; building responses."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from typing import Any, cast

from pydantic_core import from_json
from starlette.requests import HTTPConnection, Request

from models.base import LoadProgress, Model
from server.api import submissions
from server.api.model_names import ModelNames
from server.api.rate_limit import RateLimiter
from server.api.responses import FalJSONResponse
from server.auth import Keys
from server.errors import NotFound, not_offered
from server.executor import FairExecutor
from server.inputs.form import SpooledForm
from server.inputs.resolver import MAX_IMAGE_BYTES, InputResolver
from server.inputs.spool import Spool, SpooledBody
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
from server.storage.file_store import FileStore, disk_errors
from server.storage.uploads import Uploads
from server.webhooks.signing import WebhookSigner

TOO_MANY_OPEN = (
    "Limit of open responses reached: one key may use half of --max-connections, and less while other keys are active; "
    "close some responses first"
)
#: Bytes of a body that are collected before a thread writes them.
_BODY_PART = 2**18


@dataclass(frozen=True)
class Services:
    """The services of one server, which `components.py` builds."""

    models: Mapping[str, Model]
    #: Known endpoints that are not served, with the weights that they need.
    unavailable_endpoints: Mapping[str, str]
    #: Finds endpoints by the names that clients of other APIs use.
    model_names: ModelNames
    keys: Keys
    inputs: InputResolver
    #: Limits the memory of request and response bodies, in total and per key.
    in_flight: BytesInFlight
    #: Limits each key's responses that stay open while a request runs.
    open_answers: FairShare
    #: Threads for database access and for large bodies.
    executor: FairExecutor
    rate_limiter: RateLimiter
    queue: Queue
    files: FileStore
    uploads: Uploads
    retention: Retention
    signer: WebhookSigner
    notifier: Notifier
    metrics: Metrics
    #: Returns a page of a key's finished requests; blocks on the disk.
    history: Callable[[HistoryQuery], Mapping[str, Any]]
    #: Returns a key's usage; blocks on the disk.
    usage: Callable[[UsageFilter], Sequence[UsageRow]]
    #: Returns the data of /status; blocks on the disk.
    overview: Callable[[], Mapping[str, Any]]
    #: Returns whether the models can generate images, and the progress of loading.
    readiness: Callable[[], tuple[bool, LoadProgress]]
    #: Returns the state of each GPU and of the engines in its memory.
    gpus: Callable[[], Sequence[GpuStatus]]


def get_services(request: Request) -> Services:
    """Return the services of the server that handles this request."""
    return cast(Services, request.app.state.services)


def authenticate(request: Request, scope: str | None = None) -> str:
    """Return the owner of the request's key, or of a token with `scope` if that is given. Raises Unauthorized."""
    return get_services(request).keys.owner(request.headers.get("authorization"), scope)


def authenticate_with_token(connection: HTTPConnection, endpoint: str) -> str:
    """Return the owner of the connection's key, or of a token for the endpoint's app. Raises Unauthorized.

    Browsers send a token as `?fal_jwt_token=`, because they cannot set headers of a WebSocket.
    """
    keys = cast(Services, connection.app.state.services).keys
    token = connection.query_params.get("fal_jwt_token")
    if token:
        return keys.owner_of_token(token, app_alias(endpoint))
    return keys.owner(connection.headers.get("authorization"), app_alias(endpoint))


def app_alias(endpoint: str) -> str:
    """Return the name that an endpoint's app has in the scope of a token: "flux" for fal-ai/flux/dev."""
    return endpoint.split("/")[1]


def served_endpoint(services: Services, endpoint: str) -> str | None:
    """Return the id under which this server serves an endpoint; None if it does not serve the endpoint.

    fal also lists the stream routes of some endpoints, such as fal-ai/flux-lora/stream, as endpoints. Called directly,
    their route streams; for everything else, such as the queue, they are the endpoint without /stream.
    """
    return next((each for each in (endpoint, endpoint.removesuffix("/stream")) if each in services.models), None)


def get_model(request: Request, endpoint: str) -> Model:
    """Return the model that serves this endpoint. Raises NotFound, with a message that says why there is none."""
    models = get_services(request).models
    served = served_endpoint(get_services(request), endpoint)
    if served is not None:
        return models[served]
    endpoint = endpoint.removesuffix("/stream")
    if endpoint in get_services(request).unavailable_endpoints:
        weights = get_services(request).unavailable_endpoints[endpoint]
        raise NotFound(f"{endpoint} is not served here: it needs the weights {weights}")
    if request.state.fal_url and endpoint.startswith("platform/"):
        raise not_offered(request.state.fal_url)
    app = next((known for known in models if endpoint.startswith(f"{known}/")), None)
    if app is not None:
        raise NotFound(f"Path {endpoint.removeprefix(app)} not found")
    offered = ", ".join(sorted(models))
    raise NotFound(f"Application {endpoint!r} not found: it is not offered by this server, which has {offered}")


def require_owned_job(job: Job | None, owner: str, app: str) -> Job:
    """Return the job if it belongs to this owner and app. Raises NotFound otherwise.

    `app` is the full endpoint id, also with /stream, or its first two segments.
    """
    if job is None or job.owner != owner:
        raise NotFound
    # An endpoint of --models-dir may have an id that ends in /stream.
    if job.endpoint not in (app, app.removesuffix("/stream")) and app != "/".join(job.endpoint.split("/")[:2]):
        raise NotFound
    return job


@asynccontextmanager
async def receive_body(request: Request, owner: str) -> AsyncIterator[SpooledBody]:
    """Read a request's JSON body and yield it. Its temporary files, for long base64 data, exist until the block ends.

    Raises InvalidInput, TooManyRequests, BodyTooLarge and DiskFull.
    """
    body = SpooledBody(get_services(request).inputs.cache.temp_path)
    async with _received(request, owner, body):
        yield body


@asynccontextmanager
async def receive_form(request: Request, owner: str) -> AsyncIterator[SpooledForm]:
    """Read a request's multipart form and yield it. Its files exist until the block ends.

    Raises as `receive_body` does.
    """
    temp_path, content_type = get_services(request).inputs.cache.temp_path, request.headers.get("content-type", "")
    form = SpooledForm(temp_path, content_type, MAX_IMAGE_BYTES)
    async with _received(request, owner, form):
        yield form


@asynccontextmanager
async def _received(request: Request, owner: str, body: Spool) -> AsyncIterator[None]:
    """Read a request's body into `body`, whose temporary files exist until the block ends."""
    services, part = get_services(request), bytearray()
    with disk_errors(), closing(body):
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
            yield


async def parse_request(request: Request, model: Model, owner: str, mode: Mode) -> Submission:
    """Read the body and parse the request into a submission.

    Raises as `receive_body` and `submissions.parse_submission` do.
    """
    async with receive_body(request, owner) as body:
        return await parse_request_body(request, body, model, owner, mode)


async def parse_request_body(
    request: Request, body: Spool, model: Model, owner: str, mode: Mode, content_type: str | None = None
) -> Submission:
    """Parse a request into a submission; `body` is already read. Raises as `submissions.parse_submission` does."""
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
    """Wait for `num_bytes` of the owner's share of memory, call `read` in a thread, and return its response.

    The bytes are held until the response is sent, so that a client that does not read its responses cannot fill the
    memory. Raises TooManyRequests after a few seconds without room; with `is_patient`, waits without a limit.
    """
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(services.in_flight.room(owner, num_bytes, is_patient=is_patient))
        response = await services.executor.run(owner, read)
        response.room = stack.pop_all()
        return response


async def result_response_of(
    services: Services, job: Job, render: Callable[[Outcome], FalJSONResponse], *, is_patient: bool = False
) -> FalJSONResponse:
    """Call `render` for the outcome of a completed job, and return its response.

    Raises NotFound if the job was deleted, and as `read_when_room` does.
    """

    def read() -> FalJSONResponse:
        return render(services.queue.result(job))

    return await read_when_room(services, job.owner, job.output_size, read, is_patient=is_patient)


@asynccontextmanager
async def open_output(services: Services, job: Job) -> AsyncIterator[tuple[Outcome, Any]]:
    """Wait for memory, and yield the outcome of a completed job and the outcome's parsed body.

    Both count towards the owner's share of memory until the block ends. Raises NotFound if the job was deleted.
    """

    def read() -> tuple[Outcome, Any]:
        outcome = services.queue.result(job)
        return outcome, from_json(outcome.body)

    async with services.in_flight.room(job.owner, job.output_size, is_patient=True):
        yield await services.executor.run(job.owner, read)
