"""Clients that take too long, many at a time, and when each of them was closed."""

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
    """What it says at first, whether it says a byte more now and then, and whether it reads."""

    first: bytes
    drips: bool = False
    reads: bool = True


#: Whoever is late with a header, and whoever is late with a body or does not read an answer.
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
    """The others; `large` is the path of more than any buffer holds."""
    unread = Kind(f"GET {large} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), reads=False)
    return {"dripped body": DRIPPED_BODY, "never reads": unread}


@dataclass
class SlowClients:
    """Connections of these kinds, as many of each, for as long as the block lasts."""

    port: int
    kinds: Mapping[str, Kind]
    number: int
    #: Seconds between one of each kind and the next.
    pace: float = 0.0
    #: By kind, the seconds until each was closed.
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
                # As little as the system allows, so that an answer has nowhere to go.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                connection.connect(("127.0.0.1", self.port))
                connection.sendall(kind.first)
                self._open[connection.fileno()] = (name, connection, time.monotonic())
                # Its end is told in any case.
                self._poller.register(connection, select.EPOLLIN if kind.reads else 0)
        return self

    def __exit__(self, *error: object) -> None:
        for _, held, _ in self._open.values():
            held.close()
        self._poller.close()

    def watch(self, drip_seconds: float, seconds: float) -> None:
        """Drip, and note who is closed, until all are or the time is over."""
        until, next_drip = time.monotonic() + seconds, 0.0
        while self._open and time.monotonic() < until:
            for descriptor, _ in self._poller.poll(drip_seconds):
                # Nobody is answered: what is there to read is the end.
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
                # One that was closed is told of by the poller.
                with contextlib.suppress(OSError):
                    connection.send(b"a")


@contextlib.contextmanager
def few_files(number: int) -> Iterator[None]:
    """What is started meanwhile may open so many files at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
