"""Many concurrent clients that are too slow, and the time until the server closes each of their connections."""

import contextlib
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kind:
    """A kind of slow client: its first bytes, whether it then sends single bytes, and whether it reads."""

    first: bytes
    drips: bool = False
    reads: bool = True


#: Clients that do not finish the header of their request. `in_body` returns clients that are slow later.
IN_HEADER: Mapping[str, Kind] = {
    "silent": Kind(b""),
    "half a header": Kind(b"GET / HTTP/1.1\r\nHost: he"),
    "dripped header": Kind(b"GET / HTTP/1.1\r\nX-A: ", drips=True),
}
DRIPPED_BODY = Kind(
    b"POST /queue/test/null HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 1000000\r\n\r\n",
    drips=True,
)


def in_body(large: str) -> dict[str, Kind]:
    """Return the clients that do not finish a body or do not read a response.

    `large` is the path of a file that is larger than all buffers.
    """
    unread = Kind(f"GET {large} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), reads=False)
    return {"dripped body": DRIPPED_BODY, "never reads": unread}


@dataclass
class SlowClients:
    """Slow clients: `number` connections of each of `kinds`, open until the block ends."""

    port: int
    kinds: Mapping[str, Kind]
    number: int
    #: Seconds between two connections of the same kind.
    pace: float = 0.0
    #: For each kind, the seconds until the server closed each connection.
    closed: dict[str, list[float]] = field(default_factory=dict)

    def __enter__(self) -> "SlowClients":
        self.closed = {name: [] for name in self.kinds}
        self._poller = select.epoll()
        self._open: dict[int, tuple[str, socket.socket, float]] = {}
        wait = threading.Event()
        for _ in range(self.number):
            wait.wait(self.pace)
            for name, kind in self.kinds.items():
                connection = socket.socket()
                # The smallest buffer that the system allows, so that a response does not fit into it.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                connection.connect(("127.0.0.1", self.port))
                connection.sendall(kind.first)
                self._open[connection.fileno()] = (name, connection, time.monotonic())
                # epoll reports the end of a connection even with an empty mask.
                self._poller.register(connection, select.EPOLLIN if kind.reads else 0)
        return self

    def __exit__(self, *error: object) -> None:
        for _, connection, _ in self._open.values():
            connection.close()
        self._poller.close()

    def watch(self, drip_seconds: float, seconds: float) -> None:
        """Drip bytes every `drip_seconds`; record closed connections. End after `seconds`, or when all are closed."""
        deadline, next_drip = time.monotonic() + seconds, 0.0
        while self._open and time.monotonic() < deadline:
            for descriptor, _ in self._poller.poll(drip_seconds):
                # No client gets a response, so a readable connection is a closed one.
                name, connection, opened_at = self._open.pop(descriptor)
                self.closed[name].append(time.monotonic() - opened_at)
                self._poller.unregister(descriptor)
                connection.close()
            if time.monotonic() >= next_drip:
                next_drip = time.monotonic() + drip_seconds
                self._drip()

    def _drip(self) -> None:
        for name, connection, _ in self._open.values():
            if self.kinds[name].drips:
                # Ignore errors: the poller reports a connection that the server has closed.
                with contextlib.suppress(OSError):
                    connection.send(b"a")


@contextlib.contextmanager
def limited_open_files(number: int) -> Iterator[None]:
    """Limit the open files of processes started in the block to `number`, as a soft limit that they may raise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
