"""The construction of a server: the only module that builds all components and connects them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from models import discover
from models.base import LoadProgress, Model
from models.image_size import Limits
from models.loading import specs
from server import auth
from server.api.dependencies import TOO_MANY_OPEN, Services
from server.api.model_names import ModelNames
from server.api.rate_limit import RateLimiter
from server.auth import Keys, KeyScope
from server.cluster.head import ClusterHead
from server.cluster.ray_backend import RayCluster
from server.executor import FairExecutor
from server.inputs.cache import INPUTS, InputCache, size_of
from server.inputs.resolver import InputResolver
from server.metrics import Metrics, collect_gauges, collect_gpu_gauges
from server.net.bytes_in_flight import BytesInFlight
from server.net.fair_share import FairShare
from server.net.outbound import OutboundClient
from server.queue.history import query_history
from server.queue.notifier import Notifier
from server.queue.pending_storage import PendingStorage
from server.queue.queue import Queue
from server.queue.retention import Retention
from server.queue.usage import query_usage
from server.settings import Settings
from server.status import GpuStatus, load_overview
from server.storage.database import Database
from server.storage.file_store import FileStore
from server.storage.uploads import Uploads
from server.testing.fault_queue import FaultQueue
from server.webhooks.delivery import WebhookSender
from server.webhooks.signing import WebhookSigner
from server.worker.crash_recorder import CrashRecorder
from server.worker.engine_pool import engine_configs
from server.worker.worker import Worker

log = logging.getLogger(__name__)


class Backend(Protocol):
    """The part that generates images: the worker in this process, or the head of a cluster."""

    #: The error that stopped the backend, if any.
    failure: BaseException | None

    @property
    def is_ready(self) -> bool:
        """Whether at least one GPU can generate images."""

    @property
    def loading(self) -> LoadProgress:
        """The progress of loading the weights."""

    def gpus(self) -> Sequence[GpuStatus]:
        """Return the state of each GPU; safe to call from any thread."""

    def start(self) -> None:
        """Start loading weights and generating images, in the background. Raises RuntimeError if Ray cannot be used."""

    def stop(self) -> None:
        """Stop claiming jobs, let running jobs finish within --shutdown-grace, release the rest, then return."""

    def fail(self, error: BaseException) -> None:
        """Stop because of an error that the server cannot recover from; safe to call from any thread."""


@dataclass(frozen=True)
class Components:
    """The components that the application's lifespan starts and stops."""

    services: Services
    backend: Backend
    database: Database
    crash_recorder: CrashRecorder
    webhook_sender: WebhookSender


def build(settings: Settings) -> Components:
    """Build all components, connect them, and return them, without starting the backend.

    Raises ValueError for weights that cannot be served, DataDirInUse if another server uses the data directory or a
    newer version wrote it, OSError if the directory cannot be used, DiskFull, and CorruptDatabase.
    """
    known = discover(settings.models_dir)
    weights_by_endpoint = specs.assign_weights(settings.weights, known, settings.base)
    models = {endpoint: model for endpoint, model in known.items() if endpoint in weights_by_endpoint}
    database, crash_recorder = Database(settings.data_dir), CrashRecorder(settings.data_dir)
    notifier, metrics = Notifier(), Metrics(models)
    pending = PendingStorage(partial(size_of, settings.data_dir / INPUTS))
    files = FileStore(settings.data_dir / "files", database)
    queue = _queue(settings, database, notifier, metrics, pending)
    inputs = _inputs(settings, pending, files)
    backend: Backend
    if settings.ray:
        backend = head = ClusterHead(settings, queue, files, RayCluster(settings, inputs.cache.path), notifier, metrics)
        queue.on_cancel = head.cancel
    else:
        configs, input_path = engine_configs(settings, weights_by_endpoint, models), inputs.cache.path
        backend = Worker(settings, models, configs, queue, files, input_path, notifier, metrics, crash_recorder)
    database.on_corruption = backend.fail
    _add_gauges(metrics, database, settings, backend)
    signer = WebhookSigner(database, settings.webhook_secret)
    services = Services(
        models=models,
        model_names=ModelNames(models, weights_by_endpoint, settings.openai_models),
        unavailable_endpoints={name: _required_weights(known[name]) for name in known if name not in models},
        keys=_keys(settings, database),
        inputs=inputs,
        **_shared(settings),
        queue=queue,
        files=files,
        uploads=_uploads(settings, database, files),
        retention=_retention(settings, database, queue, files),
        signer=signer,
        notifier=notifier,
        metrics=metrics,
        **_queries(database, settings),
        readiness=lambda: (backend.is_ready, backend.loading),
        gpus=backend.gpus,
    )
    sender = _webhook_sender(services, database)
    return Components(services, backend, database, crash_recorder, sender)


def _webhook_sender(services: Services, database: Database) -> WebhookSender:
    copies = services.queue.webhook_copies if isinstance(services.queue, FaultQueue) else lambda request_id: 1
    outbound, metrics = services.inputs.outbound, services.metrics
    return WebhookSender(database, services.notifier, outbound, services.signer, metrics=metrics, copies=copies)


def _add_gauges(metrics: Metrics, database: Database, settings: Settings, backend: Backend) -> None:
    gauges = partial(collect_gauges, database, settings.data_dir, lambda: backend.is_ready, backend.gpus)
    metrics.add_gauges(gauges, partial(collect_gpu_gauges, backend.gpus))


def _queries(database: Database, settings: Settings) -> dict[str, Any]:
    """Build the queries that routes run on the database directly, without the queue."""
    return {
        "history": partial(query_history, database),
        "usage": partial(query_usage, database),
        "overview": partial(load_overview, database, fal_price=settings.fal_price),
    }


def _shared(settings: Settings) -> dict[str, Any]:
    """Build the limits that are divided between keys, and the threads that all keys share."""
    return {
        "rate_limiter": RateLimiter(settings.rate_per_key),
        "in_flight": BytesInFlight(4 * settings.max_body_mib * 2**20),
        # Close the connections of refused clients. Otherwise a client could keep all of --max-connections open.
        "open_answers": FairShare(settings.max_connections, TOO_MANY_OPEN, closes=True),
        "executor": FairExecutor("requests", 8, 2),
    }


def _retention(settings: Settings, database: Database, queue: Queue, files: FileStore) -> Retention:
    max_age, max_bytes = settings.retention_days * 86_400, settings.retention_gb * 1e9
    return Retention(database, queue, files, max_age=max_age, max_bytes=max_bytes)


def _uploads(settings: Settings, database: Database, files: FileStore) -> Uploads:
    return Uploads(
        settings.data_dir / "uploads",
        database,
        files,
        max_bytes=settings.max_upload_mib * 2**20,
        max_bytes_per_owner=int(settings.max_uploads_gb * 1e9),
    )


def _queue(
    settings: Settings, database: Database, notifier: Notifier, metrics: Metrics, pending: PendingStorage
) -> Queue:
    kind = FaultQueue if settings.testing else Queue
    return kind(
        database,
        notifier,
        settings.max_queue_length,
        metrics=metrics,
        max_length_per_owner=settings.max_queue_length_per_key,
        max_running_per_owner=settings.max_running_per_key,
        pending_storage=pending,
    )


def _inputs(settings: Settings, pending: PendingStorage, files: FileStore) -> InputResolver:
    return InputResolver(
        InputCache(settings.data_dir / INPUTS, pending.file_names, int(settings.loras_gb * 1e9)),
        OutboundClient(settings.outbound_allow),
        files,
        Limits(max_side=settings.max_side, max_pixels=settings.max_pixels),
        pending_bytes=pending.num_bytes,
        max_lora_bytes=settings.max_lora_mib * 2**20,
        max_control_net_bytes=settings.max_control_net_mib * 2**20,
        max_bytes_per_owner=int(settings.max_uploads_gb * 1e9),
    )


def _required_weights(model: Model) -> str:
    extra = " and ".join(weights.hub_id for weights in model.extra_weights)
    return " or ".join(model.weights) + (f" with {extra}" if extra else "")


def _keys(settings: Settings, database: Database) -> Keys:
    """Return the valid keys. If the server needs an automatic key and no key is stored, create one and print it.

    The automatic key is an operator's key. It is loaded only while the settings contain no key and the server is
    reachable remotely.
    """
    if settings.has_automatic_key and not auth.load_key_scopes(database):
        key = auth.add_key(database, "", KeyScope.OPERATOR)
        print(f"\n  The key of this server, shown only this once:\n\n      FAL_KEY={key}\n", flush=True)
    known = auth.load_key_scopes(database, with_first=settings.has_automatic_key)
    keys = Keys(
        settings.keys,
        known,
        auth.pepper(database),
        settings.operator_keys,
        separates_clients=settings.testing,
    )
    for key in (*settings.keys, *settings.operator_keys):
        # Of a key in fal's form ID:SECRET, the id is no secret.
        key_id, _, secret = key.partition(":")
        name = f"{key_id}:..." if secret else "without an id"
        log.info("the key %s in the settings has the owner %s", name, keys.owner(f"Key {key}")[:9])
    return keys
