"""create_app(settings): the one place where the parts are built and joined."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from models import discover
from models.base import Model
from models.loading import specs
from models.schema import Limits
from server import auth
from server.api import openapi
from server.api.dependencies import TOO_MANY_OPEN, Services
from server.api.middleware.body_limit import BodyLimitMiddleware
from server.api.middleware.errors import ErrorMiddleware, add_exception_handlers
from server.api.middleware.host_check import LOOPBACK_ORIGIN, HostCheckMiddleware, allowed_origins
from server.api.middleware.metrics import MetricsMiddleware
from server.api.middleware.request_id import RequestIdMiddleware
from server.api.middleware.rewrite import RewriteMiddleware
from server.api.rate_limit import RateLimiter
from server.api.routes import (
    endpoint_docs,
    files,
    monitoring,
    openai,
    platform,
    playground,
    queue,
    realtime,
    run,
    tokens,
    uploads,
)
from server.auth import Keys, KeyScope
from server.cluster.head import ClusterHead
from server.cluster.ray_backend import RayCluster
from server.errors import DiskFull
from server.executor import FairExecutor
from server.inputs.cache import INPUTS, InputCache, size_of
from server.inputs.resolver import InputResolver
from server.metrics import Metrics, collect_gauges, collect_gpu_gauges
from server.net.bytes_in_flight import BytesInFlight
from server.net.fair_share import FairShare
from server.net.outbound import OutboundClient
from server.queue import history, usage
from server.queue.notifier import Notifier
from server.queue.pending_storage import PendingStorage
from server.queue.queue import Queue
from server.queue.retention import Retention
from server.settings import Settings
from server.status import load_overview
from server.storage.database import CorruptDatabase, Database
from server.storage.file_store import FileStore
from server.storage.uploads import Uploads
from server.webhooks.delivery import WebhookSender
from server.webhooks.signing import WebhookSigner
from server.worker.crash_recorder import CrashRecorder
from server.worker.engine_pool import engine_configs
from server.worker.worker import Worker

log = logging.getLogger(__name__)

#: How often deadlines are looked at, and how often old results are forgotten, in seconds.
EXPIRE_EVERY = 0.25
SWEEP_EVERY = 60.0
#: Seconds beyond that after the disk was full.
DISK_PAUSE = 1.0
_EXPOSED = ("x-fal-request-id", "x-fal-request-timeout-type", "x-fal-error-type", "x-fal-billable-units")


def create_app(settings: Settings) -> FastAPI:
    """Build the server; nothing runs before its lifespan begins.

    Raises ValueError for weights that cannot be served and FolderInUse for a data folder that is taken.
    """
    known = discover(settings.models_dir)
    weights_by_endpoint = specs.assign_weights(settings.weights, known)
    models = {endpoint: model for endpoint, model in known.items() if endpoint in weights_by_endpoint}
    database = Database(settings.data_dir)
    absent = {
        endpoint: _required_weights(model) for endpoint, model in known.items() if endpoint not in weights_by_endpoint
    }
    crash_recorder = CrashRecorder(settings.data_dir)
    services, worker = _build_services(settings, models, absent, weights_by_endpoint, database, crash_recorder)
    app = FastAPI(
        title="flux-server",
        version=monitoring.VERSION,
        description="fal's API for FLUX.1 [dev] on your own machine.",
        lifespan=partial(_lifespan, settings=settings, database=database),
        redirect_slashes=False,
        # FastAPI's own pages load their scripts from a public network.
        docs_url=None,
        redoc_url=None,
    )
    app.state.services, app.state.worker, app.state.crash_recorder = services, worker, crash_recorder
    app.state.database = database
    app.openapi = partial(openapi.document, app, models)  # type: ignore[method-assign]
    for nouns in (
        queue,
        endpoint_docs,
        uploads,
        tokens,
        files,
        monitoring,
        playground,
        platform,
        openai,
        realtime,
        run,
    ):
        app.include_router(nouns.router)
    app.mount("/static", playground.files)
    app.mount("/docs", playground.swagger)
    add_exception_handlers(app)
    _add_middleware(app, settings, services)
    return app


def _build_services(
    settings: Settings,
    models: dict[str, Model],
    absent: Mapping[str, str],
    weights_by_endpoint: Mapping[str, str | Path | None],
    database: Database,
    crash_recorder: CrashRecorder,
) -> tuple[Services, Worker | ClusterHead]:
    notifier, metrics = Notifier(), Metrics()
    needs, store = (
        PendingStorage(partial(size_of, settings.data_dir / INPUTS)),
        FileStore(settings.data_dir / "files", database),
    )
    jobs = _queue(settings, database, notifier, metrics, needs)
    outbound, limits = (
        OutboundClient(settings.outbound_allow),
        Limits(max_side=settings.max_side, max_pixels=settings.max_pixels),
    )
    inputs = _inputs(settings, needs, outbound, store, limits)
    worker: Worker | ClusterHead
    if settings.ray:
        worker = ClusterHead(settings, jobs, store, RayCluster(settings, inputs.cache.path), notifier, metrics)
        jobs.on_cancel = worker.cancel
    else:
        placed, paths = engine_configs(settings, weights_by_endpoint), inputs.cache.path
        worker = Worker(settings, models, placed, jobs, store, paths, notifier, metrics, crash_recorder)
    database.on_corruption = worker.fail
    seen = partial(collect_gauges, database, settings.data_dir, lambda: worker.is_ready, worker.gpus)
    metrics.add_gauges(seen, partial(collect_gpu_gauges, worker.gpus))
    services = Services(
        models=models,
        unavailable_endpoints=absent,
        keys=_keys(settings, database),
        outbound=outbound,
        inputs=inputs,
        **_shared(settings),
        queue=jobs,
        files=store,
        uploads=_uploads(settings, database, store),
        retention=_retention(settings, database, jobs, store),
        signer=WebhookSigner(database, settings.webhook_secret),
        notifier=notifier,
        metrics=metrics,
        history=partial(history.query_history, database),
        usage=partial(usage.query_usage, database),
        overview=partial(load_overview, database),
        readiness=lambda: (worker.is_ready, worker.loading),
        gpus=worker.gpus,
    )
    return services, worker


def _shared(settings: Settings) -> dict[str, Any]:
    """What is shared between keys."""
    return {
        "quota": RateLimiter(settings.rate_per_key),
        "in_flight": BytesInFlight(4 * settings.max_body_mib * 2**20),
        # Who is refused must not keep the connection either, or nobody else could open one.
        "open_answers": FairShare(settings.max_connections, TOO_MANY_OPEN, closes=True),
        "turns": FairExecutor("requests", 8, 2),
    }


def _retention(settings: Settings, database: Database, jobs: Queue, store: FileStore) -> Retention:
    max_age, max_bytes = settings.retention_days * 86_400, settings.retention_gb * 1e9
    return Retention(database, jobs, store, max_age=max_age, max_bytes=max_bytes)


def _uploads(settings: Settings, database: Database, store: FileStore) -> Uploads:
    return Uploads(
        settings.data_dir / "uploads",
        database,
        store,
        max_bytes=settings.max_upload_mib * 2**20,
        max_bytes_per_owner=int(settings.max_uploads_gb * 1e9),
    )


def _queue(
    settings: Settings, database: Database, notifier: Notifier, metrics: Metrics, needs: PendingStorage
) -> Queue:
    return Queue(
        database,
        notifier,
        settings.max_queue_length,
        metrics=metrics,
        max_length_per_owner=settings.max_queue_length_per_key,
        max_running_per_owner=settings.max_running_per_key,
        pending_storage=needs,
    )


def _inputs(
    settings: Settings, needs: PendingStorage, outbound: OutboundClient, store: FileStore, limits: Limits
) -> InputResolver:
    return InputResolver(
        InputCache(settings.data_dir / INPUTS, needs.file_names, int(settings.loras_gb * 1e9)),
        outbound,
        store,
        limits,
        pending_bytes=needs.num_bytes,
        max_lora_bytes=settings.max_lora_mib * 2**20,
        max_bytes_per_owner=int(settings.max_uploads_gb * 1e9),
    )


def _required_weights(model: Model) -> str:
    return " or ".join(model.weights) + (f" with {model.extra_weights.hub_id}" if model.extra_weights else "")


def _keys(settings: Settings, database: Database) -> Keys:
    """The operator's keys; where others can reach the server and there is none, one made and printed at the start."""
    if settings.has_automatic_key and not auth.load_key_scopes(database):
        key = auth.add_key(database, "", KeyScope.OPERATOR)
        print(f"\n  The key of this server, shown this once:\n\n      FAL_KEY={key}\n", flush=True)
    known = auth.load_key_scopes(database, with_first=settings.has_automatic_key)
    return Keys(settings.keys, known, auth.pepper(database), settings.operator_keys)


def _add_middleware(app: FastAPI, settings: Settings, services: Services) -> None:
    """From the innermost, which is added first, to the outermost."""
    is_open = services.keys.allows_anonymous
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.max_body_mib * 2**20)
    app.add_middleware(RewriteMiddleware, settings=settings)
    app.add_middleware(ErrorMiddleware)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=allowed_origins(settings) if is_open else ["*"],
        allow_origin_regex=LOOPBACK_ORIGIN if is_open else None,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=_EXPOSED,
    )
    app.add_middleware(HostCheckMiddleware, settings=settings, is_open=is_open)
    app.add_middleware(RequestIdMiddleware)
    app.add_middleware(MetricsMiddleware, metrics=services.metrics)


@asynccontextmanager
async def _lifespan(app: FastAPI, settings: Settings, database: Database) -> AsyncIterator[None]:
    services: Services = app.state.services
    worker: Worker | ClusterHead = app.state.worker
    services.notifier.bind_loop(asyncio.get_running_loop())
    _record_crash(app.state.crash_recorder, services.queue)
    services.queue.recover()
    services.files.delete_orphans()
    services.signer.rotate()
    worker.start()
    tasks = [
        asyncio.create_task(
            WebhookSender(
                database, services.notifier, services.outbound, services.signer, metrics=services.metrics
            ).run()
        ),
        asyncio.create_task(_run_periodically(EXPIRE_EVERY, services.queue.fail_expired)),
        asyncio.create_task(_run_periodically(SWEEP_EVERY, services.retention.sweep)),
        asyncio.create_task(_run_periodically(SWEEP_EVERY, services.uploads.sweep)),
        asyncio.create_task(_run_periodically(SWEEP_EVERY, services.inputs.sweep)),
    ]
    try:
        yield
    finally:
        await asyncio.to_thread(worker.stop)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        database.close()


def _record_crash(crash_recorder: CrashRecorder, jobs: Queue) -> None:
    """Blame what the last process worked at, if it died of a fault of its own; from now on this one's is recorded."""
    trace, request_ids = crash_recorder.read()
    if trace:
        at = ", ".join(request_ids) or "no request"
        log.error("the last process died of a fault of its own while it worked at %s:\n%s", at, trace)
        jobs.record_crash_at_startup(request_ids)
    # Only now, because what was recorded is gone then; a kill in between is one strike too many, and not one too few.
    crash_recorder.open()


async def _run_periodically(seconds: float, func: Callable[[], object]) -> None:
    while True:
        try:
            await asyncio.to_thread(func)
        except CorruptDatabase:
            # The server ends, and says why.
            return
        except DiskFull as error:
            log.error("%s; trying again", error)
            await asyncio.sleep(DISK_PAUSE)
        except Exception:
            log.exception("%s failed; trying again", func)
        await asyncio.sleep(seconds)
