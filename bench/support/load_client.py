"""Clients that send each request as soon as the last one is answered. They leave most CPU time to the server."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import uvloop


class Client(asyncio.Protocol):
    """A connection that sends its next request as soon as the last one is answered, until `is_over`."""

    def __init__(self, request: bytes, is_over: Callable[[], bool]) -> None:
        self.request, self.is_over = request, is_over
        self.seconds: list[float] = []
        self.request_ids: list[bytes] = []
        self.bad = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self.transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Count the response once it is complete, and send the next request."""
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
        """Return the request to send after the response with this body."""
        return self.request

    def connection_lost(self, exception: Exception | None) -> None:
        """Fail `done` if the server closes the connection early."""
        if not self.done.done():
            self.done.set_exception(
                exception or ConnectionResetError("the server closed the connection before the client was done")
            )

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self.transport.write(self.request)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Figures:
    """The results of all clients of one load together."""

    #: Seconds that each response took, ascending.
    seconds: list[float]
    #: Seconds that the whole load took.
    elapsed: float
    #: Number of responses whose status is neither 200 nor 202.
    bad: int
    request_ids: list[bytes]

    @property
    def per_second(self) -> float:
        """The number of responses a second."""
        return len(self.seconds) / self.elapsed

    def milliseconds(self, share: float) -> float:
        """Return the milliseconds within which this share of the responses came."""
        return 1000 * self.seconds[min(len(self.seconds) - 1, int(len(self.seconds) * share))]

    def __str__(self) -> str:
        quantiles = " ".join(f"p{100 * share:.0f}_ms {self.milliseconds(share):.1f}" for share in (0.5, 0.99))
        return f"per_second {self.per_second:.1f} {quantiles} bad {self.bad}"


async def _load(port: int, clients: int, client: Callable[[], Client]) -> Figures:
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    connections = [await loop.create_connection(client, "127.0.0.1", port) for _ in range(clients)]
    await asyncio.gather(*(client.done for _, client in connections))
    taken = time.perf_counter() - start
    times = sorted(second for _, client in connections for second in client.seconds)
    request_ids = [request_id for _, client in connections for request_id in client.request_ids]
    return Figures(times, taken, sum(client.bad for _, client in connections), request_ids)


def request(method: str, path: str, body: bytes = b"") -> bytes:
    """Return an HTTP/1.1 request with a JSON body."""
    return (
        f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body


def load(port: int, clients: int, client: Callable[[], Client]) -> Figures:
    """Run `clients` clients and return their figures. Raises OSError if the server closes a connection early."""
    return uvloop.run(_load(port, clients, client))


def repeating_client(request: bytes, seconds: float) -> Callable[[], Client]:
    """Return a factory of clients that repeat `request` for `seconds` from now."""
    end = time.monotonic() + seconds
    return lambda: Client(request, lambda: time.monotonic() >= end)
