"""Listening sockets, and uvicorn's servers on them, plain and TLS. Independent of the app and the queue."""

import contextlib
import errno
import logging
import resource
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from server.net.timeouts import with_limits
from server.net.tls import CertificateFiles
from server.net.websocket import CountedWebSocket

log = logging.getLogger(__name__)

_BACKLOG = 2048
#: Default seconds that open responses have to end after the worker has stopped.
GRACEFUL_TIMEOUT = 5
#: Open files apart from connections and the files sent over them: the database, weights, webhook connections.
_OTHER_FILES = 512


class Listener(uvicorn.Server):
    """One of several uvicorn servers on one event loop. The process handles signals itself, so no listener does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers, unlike uvicorn."""
        yield


def raise_open_file_limit(max_connections: int, ports: int) -> int:
    """Raise the limit of open files as far as needed and allowed; return how many connections a port can hold.

    Most processes start with a limit of 1024 files. A connection takes two: its socket, and the image sent over it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * ports * max_connections + _OTHER_FILES
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit == needed:
        return max_connections
    room = max(1, (limit - _OTHER_FILES) // (2 * ports))
    log.warning(
        "only %d open files are allowed (ulimit -Hn), so each port accepts %d connections; raise the limit", hard, room
    )
    return room


def build_listeners(
    app: ASGIApp,
    *,
    max_connections: int,
    ws_max_size: int,
    certificate: CertificateFiles | None,
    graceful_timeout: int = GRACEFUL_TIMEOUT,
) -> list[Listener]:
    """Build a listener for plain HTTP, and one for TLS if there is a certificate.

    Args:
        app: the application that handles the requests.
        max_connections: the limit for each listener.
        ws_max_size: the largest WebSocket message, in bytes.
        certificate: the files of the certificate and its key.
        graceful_timeout: seconds that open responses have to end after the worker has stopped.
    """
    options: dict[str, Any] = {
        "lifespan": "off",
        "access_log": False,
        "http": with_limits(max_connections=max_connections),
        "ws": CountedWebSocket,
        "ws_max_size": ws_max_size,
        # No compression, because a message that is small on the wire could be large in memory.
        "ws_per_message_deflate": False,
        # uvicorn logs through the server's own logging configuration.
        "log_config": None,
        "log_level": "warning",
        "proxy_headers": False,
        "server_header": False,
        "timeout_graceful_shutdown": graceful_timeout,
    }
    listeners = [Listener(uvicorn.Config(app, **options))]
    if certificate:
        files: dict[str, Any] = {"ssl_certfile": str(certificate.certificate), "ssl_keyfile": str(certificate.key)}
        listeners.append(Listener(uvicorn.Config(app, **options, **files)))
    return listeners


def bind_socket(host: str, port: int) -> socket.socket:
    """Open and return a listening socket. Raises OSError, naming host and port.

    Call before anything else at startup, so that a port in use ends the program at once.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only if the protocol is set. With the algorithm, each event takes 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        hint = "; another flux-server may be running there; choose other ports with --port and --tls-port"
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror}{hint if error.errno == errno.EADDRINUSE else ''}"
        ) from None
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener
