"""The FastAPI application: the components of the server with routes, middleware and background tasks."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache, partial

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from server.api import openapi
from server.api.dependencies import Services
from server.api.middleware import request_id
from server.api.middleware.body_limit import BodyLimitMiddleware
from server.api.middleware.errors import ErrorMiddleware, add_exception_handlers
from server.api.middleware.host_check import LOOPBACK_ORIGIN, HostCheckMiddleware, allowed_origins
from server.api.middleware.metrics import MetricsMiddleware
from server.api.middleware.request_id import RequestIdMiddleware
from server.api.middleware.rewrite import RewriteMiddleware
from server.api.operations import ERRORS
from server.api.routes import (
    a1111,
    endpoint_docs,
    files,
    monitoring,
    openai,
    platform,
    playground,
    queue,
    realtime,
    run,
    testing,
    tokens,
    uploads,
)
from server.components import Components, build
from server.errors import DiskFull
from server.net.client_variables import ADDRESS, testing_variables
from server.net.tls import certificate_files
from server.queue.queue import Queue
from server.settings import Settings
from server.storage.database import CorruptDatabase
from server.storage.durable import RETRY_SECONDS
from server.worker.crash_recorder import CrashRecorder

log = logging.getLogger(__name__)

#: Seconds between checks for requests whose start deadline has passed.
EXPIRE_EVERY = 0.25
#: Seconds between deletions of old results, unfinished uploads and unneeded input files.
SWEEP_EVERY = 60.0
#: The routes of each part of the API, in the order in which they are matched.
_SURFACES = (queue, endpoint_docs, uploads, tokens, files, monitoring, playground, platform, openai, realtime, run)
#: Response headers that scripts of other origins may read.
_EXPOSED = (
    request_id.HEADER,
    request_id.OPENAI_HEADER,
    "x-fal-request-timeout-type",
    "x-fal-error-type",
    "x-fal-billable-units",
)


def create_app(settings: Settings) -> FastAPI:
    """Build the application. Its lifespan starts and stops the backend and the background tasks.

    Raises as `components.build` does.
    """
    components = build(settings)
    services = components.services
    app = FastAPI(
        title="flux-server",
        version=monitoring.VERSION,
        description="fal's API for FLUX.1 [dev] on your own machine.",
        lifespan=partial(_lifespan, components=components),
        redirect_slashes=False,
        # FastAPI's own documentation pages load scripts from other hosts; the playground's routes replace them.
        docs_url=None,
        redoc_url=None,
        # `endpoint_docs` serves the document instead, because it names the URL by which a client reached the server.
        openapi_url=None,
        generate_unique_id_function=lambda route: "_".join([*map(str, route.tags), route.name]),
    )
    app.state.components, app.state.services = components, services
    is_open = services.keys.allows_anonymous
    app.openapi = cache(partial(openapi.document, app, services.models, is_open=is_open))  # type: ignore[method-assign]
    if settings.a1111:
        app.state.a1111_sessions = {}
        app.include_router(a1111.router, responses=ERRORS)
    if settings.testing:
        app.state.client_variables = testing_variables(settings, certificate_files(settings.data_dir))
        app.state.client_settings = settings.model_dump(mode="json", include=set(ADDRESS))
        app.include_router(testing.router, responses=ERRORS)
    for surface in _SURFACES:
        app.include_router(surface.router, responses=ERRORS)
    app.mount("/static", playground.files)
    app.mount("/docs", playground.swagger)
    add_exception_handlers(app)
    _add_middleware(app, settings, services)
    return app


def _add_middleware(app: FastAPI, settings: Settings, services: Services) -> None:
    """Add the middleware, the innermost first."""
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
async def _lifespan(app: FastAPI, components: Components) -> AsyncIterator[None]:
    services, backend = components.services, components.backend
    services.notifier.bind_loop(asyncio.get_running_loop())
    _record_crash(components.crash_recorder, services.queue)
    services.queue.recover()
    services.files.delete_orphans()
    services.signer.rotate()
    backend.start()
    tasks = [
        asyncio.create_task(components.webhook_sender.run()),
        asyncio.create_task(_run_periodically(EXPIRE_EVERY, services.queue.fail_expired)),
        asyncio.create_task(_run_periodically(SWEEP_EVERY, services.retention.sweep)),
        asyncio.create_task(_run_periodically(SWEEP_EVERY, services.uploads.sweep)),
        asyncio.create_task(_run_periodically(SWEEP_EVERY, services.inputs.sweep)),
    ]
    try:
        yield
    finally:
        await asyncio.to_thread(backend.stop)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        components.database.close()


def _record_crash(crash_recorder: CrashRecorder, queue: Queue) -> None:
    """If the last process crashed, count a crash for the jobs that it was running. Then start this process's record."""
    trace, request_ids = crash_recorder.read()
    if trace:
        jobs = ", ".join(request_ids) or "no request"
        log.error("the last process crashed while it was running %s. Its stack trace:\n%s", jobs, trace)
        queue.record_crash_at_startup(request_ids)
    # `open` erases the record, so the crash is counted first. If the process is killed between the two, the next start
    # counts the crash again, which is better than missing it.
    crash_recorder.open()


async def _run_periodically(seconds: float, func: Callable[[], object]) -> None:
    name = getattr(func, "__qualname__", func)
    while True:
        try:
            await asyncio.to_thread(func)
        except CorruptDatabase:
            # `Database.on_corruption` has already made the backend fail, so the server is about to stop.
            return
        except DiskFull as error:
            log.error("%s failed: %s; trying again", name, error)
            await asyncio.sleep(RETRY_SECONDS)
        except Exception:
            log.exception("%s failed; trying again", name)
        await asyncio.sleep(seconds)
