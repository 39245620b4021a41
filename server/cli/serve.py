"""The server process: start, signals and graceful shutdown."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

import uvicorn

from server import auth
from server.api.dependencies import Services
from server.app import create_app
from server.cli import control_socket
from server.cli.control import Control
from server.cli.first_steps import first_steps
from server.cli.testing import with_testing_defaults
from server.components import Components
from server.inputs.resolver import MAX_INPUT_BYTES
from server.net import tls
from server.net.connect_proxy import MAX_TUNNELS, ConnectProxy
from server.net.listeners import GRACEFUL_TIMEOUT, bind_socket, build_listeners, raise_open_file_limit
from server.net.timeouts import limit_tls_handshake
from server.queue.notifier import WEBHOOKS, WORKER
from server.settings import Settings

log = logging.getLogger(__name__)

#: Threads of asyncio's default executor. asyncio itself would start only six on two cores.
_OTHER_THREADS = 32


def serve_until_stopped(settings: Settings) -> BaseException | None:
    """Serve until SIGINT, SIGTERM or SIGHUP, or until the backend fails; return the backend's error, or None.

    Raises OSError if a port is in use, and ValueError, OSError, RuntimeError and DiskFull if the server cannot start.
    """
    settings = with_testing_defaults(settings)
    sockets = [bind_socket(settings.host, settings.port)]
    if settings.tls_port:
        sockets.append(bind_socket(settings.host, settings.tls_port))
    # With port 0, the actual port is known only now. URLs in responses contain it.
    settings = settings.model_copy(update={"port": sockets[0].getsockname()[1]})
    loop_factory = uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(_serve(settings, sockets))


async def _serve(settings: Settings, sockets: list[socket.socket]) -> BaseException | None:
    app = create_app(settings)
    components: Components = app.state.components
    services, backend = components.services, components.backend
    # The CONNECT proxy counts as one more port, because each of its connections also needs two open files.
    room = raise_open_file_limit(settings.max_connections, len(sockets) + bool(settings.proxy_port))
    ws_max_size = min(MAX_INPUT_BYTES, settings.max_body_mib * 2**20)
    certificate = _certificate(settings)
    # Clients in tests leave connections open, and a stop should not wait for them.
    limits = {"ws_max_size": ws_max_size, "graceful_timeout": 0 if settings.testing else GRACEFUL_TIMEOUT}
    listeners = build_listeners(app, max_connections=room, certificate=certificate, **limits)
    stopping = asyncio.Event()
    # This executor needs many threads for DNS lookups: one key may run eight at a time, and some never finish.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_OTHER_THREADS, "default"))
    limit_tls_handshake(asyncio.get_running_loop())
    _install_signal_handlers(stopping)
    _watch_process(settings.exit_with_process, stopping)
    proxy = await _open_connect_proxy(settings, sockets, min(MAX_TUNNELS, room))
    async with (
        app.router.lifespan_context(app),
        control_socket.serve_control_socket(_control(components, settings), settings.data_dir),
    ):
        # Install the handlers again, because Ray has replaced them.
        _install_signal_handlers(stopping)
        with services.notifier.subscribe(WORKER) as worker_ended:
            # The backend may have failed before the subscription.
            if backend.failure:
                worker_ended.set()
            servers = [
                asyncio.create_task(listener.serve([bound])) for listener, bound in zip(listeners, sockets, strict=True)
            ]
            _announce(settings, sockets, services)
            waits = [asyncio.create_task(event.wait()) for event in (stopping, worker_ended)]
            await asyncio.wait([*waits, *servers], return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        await _stop(components, listeners, servers)
        # Close the proxy after the listeners, because some of their responses pass through the proxy.
        if proxy:
            await proxy.close()
    log.info("stopped; %d requests wait for the next start", services.queue.length)
    return backend.failure


async def _stop(
    components: Components, listeners: Sequence[uvicorn.Server], servers: Sequence[asyncio.Task[None]]
) -> None:
    """Let running requests finish within the grace period, then end the listeners with their connections."""
    services = components.services
    services.notifier.is_stopping = True
    log.info("stopping")
    # Stop the backend first. Clients are still connected, so they get the results of the grace period.
    await asyncio.to_thread(components.backend.stop)
    services.notifier.close()
    for listener in listeners:
        listener.should_exit = True
    await asyncio.gather(*servers, return_exceptions=True)


def _control(components: Components, settings: Settings) -> Control:
    """Build the operator's commands on the running server's components."""
    services, database = components.services, components.database

    def reload_keys() -> None:
        services.keys.reload(auth.load_key_scopes(database, with_first=settings.has_automatic_key))

    return Control(
        database,
        settings.data_dir,
        on_keys_changed=reload_keys,
        on_webhook_redelivered=partial(services.notifier.notify, WEBHOOKS),
        is_open=lambda: services.keys.allows_anonymous,
        queue=services.queue,
    )


def _certificate(settings: Settings) -> tls.CertificateFiles | None:
    """Return the certificate's files, which are created if necessary; None without a TLS port."""
    if not settings.tls_port:
        return None
    return tls.ensure_certificate(settings.data_dir, settings.host, urlsplit(settings.public_url).hostname or "")


def _install_signal_handlers(stopping: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # nohup makes the process ignore SIGHUP. Keep this, so that the server survives the end of its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, stopping.set)


def _watch_process(pid: int, stopping: asyncio.Event) -> None:
    """Set `stopping` when the process with this id ends; do nothing for 0. Raises OSError if there is no process."""
    if not pid:
        return
    try:
        descriptor = os.pidfd_open(pid)
    except OSError as error:
        raise OSError(f"--exit-with-process {pid}: {error.strerror}") from None
    asyncio.get_running_loop().add_reader(descriptor, stopping.set)


async def _open_connect_proxy(
    settings: Settings, sockets: list[socket.socket], max_tunnels: int
) -> ConnectProxy | None:
    """Open the CONNECT proxy and return it; return None if it is turned off.

    The proxy binds to loopback only, because its clients count as local.
    """
    if not settings.proxy_port:
        return None
    port, tls_port = (bound.getsockname()[1] for bound in sockets)
    proxy = ConnectProxy(
        settings.local_address,
        port,
        tls_port,
        allow_any_host=settings.proxy_others,
        max_tunnels=max_tunnels,
    )
    await proxy.open("127.0.0.1", settings.proxy_port)
    return proxy


def _announce(settings: Settings, sockets: list[socket.socket], services: Services) -> None:
    """Print the server's addresses and the first steps; log only the addresses if programs read the output."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    urls = [f"http://{host}:{settings.port}"]
    if settings.tls_port:
        urls.append(f"https://{host}:{sockets[1].getsockname()[1]}")
    needs_key = not services.keys.allows_anonymous
    keys = "clients must send a key: set FAL_KEY to one" if needs_key else "no key is required"
    message = f"flux-server listens on {' and '.join(urls)} ({keys})"
    if settings.log_format == "json":
        log.info(message)
        return
    steps = first_steps(settings, services.model_names.default, needs_key=needs_key)
    # One write, also if Python does not buffer its output: otherwise log lines of other threads could come in between.
    print(f"{message}\n{steps}\n", end="", flush=True)
