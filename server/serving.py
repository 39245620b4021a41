"""Two listeners, plain and TLS, in front of one app, until a signal stops them."""

import asyncio
import contextlib
import errno
import logging
import resource
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI

from server import control_socket, tls
from server.app import create_app
from server.connect import MAX_TUNNELS, ConnectDoor
from server.deadlines import hurry_handshakes, timed
from server.inputs import MAX_INPUT_BYTES
from server.notifier import WORKER
from server.settings import Settings
from server.sockets import CountedWebSocket

log = logging.getLogger(__name__)

_BACKLOG = 2048
#: Seconds that open answers get to end once the worker has stopped.
_LAST_WORDS = 5
#: Files beside the connections and what they are sent: the database, weights, receivers of webhooks.
_OTHER_FILES = 512
#: For all that has no threads of its own; asyncio's own number is six on two cores.
_OTHER_THREADS = 32


class _Listener(uvicorn.Server):
    """One of several servers on one loop: signals belong to `serve_until_stopped`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signal handlers alone."""
        yield


def serve_until_stopped(settings: Settings) -> BaseException | None:
    """Serve until SIGINT, SIGTERM or the end of the terminal; returns why the worker failed, if it did.

    Raises OSError when a port is taken, ValueError and RuntimeError for what create_app refuses.
    """
    sockets = [_bound(settings.host, settings.port)]
    if settings.tls_port:
        sockets.append(_bound(settings.host, settings.tls_port))
    # A port of 0 is known only now, and URLs in answers name it.
    settings = settings.model_copy(update={"port": sockets[0].getsockname()[1]})
    loop_factory = uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(_serve(settings, sockets))


async def _serve(settings: Settings, sockets: list[socket.socket]) -> BaseException | None:
    app = create_app(settings)
    parts, worker = app.state.parts, app.state.worker
    # The CONNECT door counts as a port: it holds two sockets for each of its tunnels.
    room = room_for(settings.max_connections, len(sockets) + bool(settings.proxy_port))
    listeners = _listeners(app, settings, room)
    stopping = asyncio.Event()
    # Names are looked up there, eight at a time for one key, and some servers of names never answer.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_OTHER_THREADS, "others"))
    hurry_handshakes(asyncio.get_running_loop())
    _hear_signals(stopping)
    door = await _door(settings, sockets, min(MAX_TUNNELS, room))
    async with app.router.lifespan_context(app), control_socket.listening(app.state.control, settings.data_dir):
        # Once more, because Ray has put handlers of its own in their place.
        _hear_signals(stopping)
        with parts.notifier.listen(WORKER) as worker_ended:
            # It may have failed before anybody listened.
            if worker.failure:
                worker_ended.set()
            served = [
                asyncio.create_task(listener.serve([bound])) for listener, bound in zip(listeners, sockets, strict=True)
            ]
            _announce(settings, sockets, is_open=parts.keys.is_open)
            waits = [asyncio.create_task(event.wait()) for event in (stopping, worker_ended)]
            await asyncio.wait([*waits, *served], return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        parts.notifier.is_stopping = True
        log.info("stopping")
        # The worker first, while clients still listen: what it finishes within the grace reaches them.
        await asyncio.to_thread(worker.stop)
        parts.notifier.close()
        for listener in listeners:
            listener.should_exit = True
        await asyncio.gather(*served, return_exceptions=True)
        # After the answers, some of which go through it.
        if door:
            await door.close()
    failure: BaseException | None = worker.failure
    return failure


def _hear_signals(stopping: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup the server is to outlive its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, stopping.set)


def room_for(max_connections: int, ports: int) -> int:
    """How many connections a port can hold, once this process may open as many files as it can: most begin with 1024.

    Two files for each: its socket, and the picture that it is sent.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * ports * max_connections + _OTHER_FILES
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit == wanted:
        return max_connections
    room = max(1, (limit - _OTHER_FILES) // (2 * ports))
    log.warning("%d open files are allowed (ulimit -Hn), so a port holds %d connections", hard, room)
    return room


def _listeners(app: FastAPI, settings: Settings, max_connections: int) -> list[_Listener]:
    options: dict[str, Any] = {
        "lifespan": "off",
        "access_log": False,
        "http": timed(max_connections=max_connections),
        "ws": CountedWebSocket,
        "ws_max_size": min(MAX_INPUT_BYTES, settings.max_body_mib * 2**20),
        # What is small on its way would be large here.
        "ws_per_message_deflate": False,
        # Its messages go where ours go.
        "log_config": None,
        "log_level": "warning",
        "proxy_headers": False,
        "server_header": False,
        "timeout_graceful_shutdown": _LAST_WORDS,
    }
    listeners = [_Listener(uvicorn.Config(app, **options))]
    if settings.tls_port:
        files = tls.ensure(settings.data_dir, settings.host, urlsplit(settings.public_url).hostname or "")
        certificate: dict[str, Any] = {"ssl_certfile": str(files.certificate), "ssl_keyfile": str(files.key)}
        listeners.append(_Listener(uvicorn.Config(app, **options, **certificate)))
    return listeners


async def _door(settings: Settings, sockets: list[socket.socket], max_tunnels: int) -> ConnectDoor | None:
    """The CONNECT door, on loopback whatever the host is: who comes through it is believed to be here."""
    if not settings.proxy_port:
        return None
    port, tls_port = (bound.getsockname()[1] for bound in sockets)
    others = settings.proxy_others
    door = ConnectDoor(settings.own_address, port, tls_port, lets_others_through=others, max_tunnels=max_tunnels)
    await door.open("127.0.0.1", settings.proxy_port)
    return door


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens: bound before anything else, so that a taken port stops the start."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio turns Nagle's algorithm off only where it is: 40 ms an event otherwise.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        hint = "; another flux-server perhaps, --port and --tls-port choose others"
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror}{hint if error.errno == errno.EADDRINUSE else ''}"
        ) from None
    bound.listen(_BACKLOG)
    bound.setblocking(False)
    return bound


def _announce(settings: Settings, sockets: list[socket.socket], *, is_open: bool) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    lines = [f"http://{host}:{settings.port}"]
    if settings.tls_port:
        lines.append(f"https://{host}:{sockets[1].getsockname()[1]}")
    keys = "No key is asked for" if is_open else "Clients must send a key"
    print(f"flux-server listens on {' and '.join(lines)}\n{keys}; `flux-server env` says how to get here", flush=True)
