"""Clients that send their next request as soon as the last is answered, at little cost to the machine they share."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import uvloop


class Client(asyncio.Protocol):
    """One connection that sends its next request as soon as the last is answered, while more are wanted."""

    def __init__(self, request: bytes, is_over: Callable[[], bool]) -> None:
        self.request, self.is_over = request, is_over
        self.seconds: list[float] = []
        self.request_ids: list[bytes] = []
        self.bad = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Count the answer when all of it is here, and go on."""
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0]) if separator else 0
        if not separator or len(body) < length:
            return
        self.bad += not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 202"))
        self.seconds.append(time.perf_counter() - self._sent)
        self.request_ids.append(head.partition(b"x-fal-request-id: ")[2][:36])
        self._buffer = b""
        self.request = self.next_request(body)
        if self.is_over():
            self.done.set_result(None)
            self.transport.close()
        else:
            self._send()

    def next_request(self, body: bytes) -> bytes:
        """What follows this answer."""
        return self.request

    def connection_lost(self, exception: Exception | None) -> None:
        """Whoever is cut off says so."""
        if not self.done.done():
            self.done.set_exception(exception or ConnectionResetError("the server hung up"))

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self.transport.write(self.request)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Figures:
    """What so many clients had from the server, all together."""

    #: How long each answer took, ascending, and all of them.
    seconds: list[float]
    taken: float
    bad: int
    request_ids: list[bytes]

    @property
    def per_second(self) -> float:
        """Answers."""
        return len(self.seconds) / self.taken

    def milliseconds(self, share: float) -> float:
        """Within which this share of the answers came."""
        return 1000 * self.seconds[min(len(self.seconds) - 1, int(len(self.seconds) * share))]

    def __str__(self) -> str:
        """One line."""
        quantiles = " ".join(f"p{100 * share:.0f}_ms {self.milliseconds(share):.1f}" for share in (0.5, 0.99))
        return f"per_second {self.per_second:.1f} {quantiles} bad {self.bad}"


async def _load(port: int, clients: int, client: Callable[[], Client]) -> Figures:
    loop = asyncio.get_running_loop()
    begun = time.perf_counter()
    made = [await loop.create_connection(client, "127.0.0.1", port) for _ in range(clients)]
    await asyncio.gather(*(client.done for _, client in made))
    taken = time.perf_counter() - begun
    times = sorted(second for _, client in made for second in client.seconds)
    request_ids = [request_id for _, client in made for request_id in client.request_ids]
    return Figures(times, taken, sum(client.bad for _, client in made), request_ids)


def request(method: str, path: str, body: bytes = b"") -> bytes:
    """A whole request in HTTP/1.1, whose body is JSON."""
    return (
        f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body


def load(port: int, clients: int, client: Callable[[], Client]) -> Figures:
    """So many of these clients, until each has enough. Raises OSError for one that is cut off."""
    return uvloop.run(_load(port, clients, client))


def again(request: bytes, seconds: float) -> Callable[[], Client]:
    """Clients that send this again and again, for so long."""
    end = time.monotonic() + seconds
    return lambda: Client(request, lambda: time.monotonic() >= end)
