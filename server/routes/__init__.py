"""The routes, one file a noun; what they need of the server is in `Parts`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from starlette.requests import Request

from models.base import Model
from models.schema import Limits
from server.auth import Keys
from server.errors import NotFound
from server.fetch import Guard
from server.files import Files
from server.jobs import Job
from server.notifier import Notifier
from server.queue import Queue
from server.signing import Signer
from server.uploads import Uploads
from server.worker import Worker


@dataclass(frozen=True)
class Parts:
    """The parts of one server, joined in `app.py`."""

    models: Mapping[str, Model]
    limits: Limits
    keys: Keys
    guard: Guard
    queue: Queue
    files: Files
    uploads: Uploads
    signer: Signer
    notifier: Notifier
    worker: Worker


def parts_of(request: Request) -> Parts:
    """The parts of the server that this request came to."""
    return cast(Parts, request.app.state.parts)


def owner_of(request: Request, scope: str | None = None) -> str:
    """Who is calling, by key, or by a token of this scope. Raises Unauthorized."""
    return parts_of(request).keys.owner(request.headers.get("authorization"), scope)


def model_for(request: Request, endpoint: str) -> Model:
    """The model served under this id. Raises NotFound in fal's words."""
    models = parts_of(request).models
    if endpoint in models:
        return models[endpoint]
    app = next((known for known in models if endpoint.startswith(f"{known}/")), None)
    if app is not None:
        raise NotFound(f"Path {endpoint.removeprefix(app)} not found")
    raise NotFound(f"Application {endpoint!r} not found; there are {', '.join(sorted(models))}")


def owned(job: Job | None, owner: str, app: str) -> Job:
    """The job, if it is this caller's and of this app (two-segment or full id). Raises NotFound."""
    if job is None or job.owner != owner:
        raise NotFound
    if app != job.endpoint and app != "/".join(job.endpoint.split("/")[:2]):
        raise NotFound
    return job
