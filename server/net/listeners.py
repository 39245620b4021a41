"""Sockets that listen, and uvicorn's servers on them, plain and TLS. Knows neither the app nor the queue."""

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
#: Seconds that open answers get to end once the worker has stopped.
_GRACEFUL_TIMEOUT = 5
#: Files beside the connections and what they are sent: the database, weights, receivers of webhooks.
_OTHER_FILES = 512


class Listener(uvicorn.Server):
    """One of several servers on one loop: signals belong to the whole process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signal handlers alone."""
        yield


def raise_open_file_limit(max_connections: int, ports: int) -> int:
    """Let this process open as many files as it needs and may, and return how many connections a port can hold.

    Most processes begin with 1024 files.

    Two files for each: its socket, and the image that it is sent.
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


def build_listeners(
    app: ASGIApp, *, max_connections: int, ws_max_size: int, certificate: CertificateFiles | None
) -> list[Listener]:
    """A listener for plain HTTP, and one for TLS where there is a certificate.

    Args:
        app: what answers.
        max_connections: of each listener.
        ws_max_size: bytes of a WebSocket message.
        certificate: the files of the certificate and its key.
    """
    options: dict[str, Any] = {
        "lifespan": "off",
        "access_log": False,
        "http": with_limits(max_connections=max_connections),
        "ws": CountedWebSocket,
        "ws_max_size": ws_max_size,
        # A message that is small on the wire could be large in memory.
        "ws_per_message_deflate": False,
        # Its log lines go where ours go.
        "log_config": None,
        "log_level": "warning",
        "proxy_headers": False,
        "server_header": False,
        "timeout_graceful_shutdown": _GRACEFUL_TIMEOUT,
    }
    listeners = [Listener(uvicorn.Config(app, **options))]
    if certificate:
        files: dict[str, Any] = {"ssl_certfile": str(certificate.certificate), "ssl_keyfile": str(certificate.key)}
        listeners.append(Listener(uvicorn.Config(app, **options, **files)))
    return listeners


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError, which names host and port.

    It is bound before anything else, so that a taken port stops the start.
    """
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
