"""Clients that send their next request as soon as the last is answered, at little cost to the machine they share."""

import asyncio
import statistics
import time

import uvloop


class Client(asyncio.Protocol):
    """One connection that sends the same request until the deadline."""

    def __init__(self, request: bytes, deadline: float) -> None:
        self.request, self.deadline = request, deadline
        self.seconds: list[float] = []
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
        self._buffer = b""
        if time.monotonic() < self.deadline:
            self._send()
        else:
            self.transport.close()
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Say so, if it was not this side that closed it."""
        if not self.done.done():
            self.done.set_exception(error or ConnectionResetError("the server closed the connection"))

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self.transport.write(self.request)  # type: ignore[attr-defined]


def request(method: str, path: str, body: bytes = b"") -> bytes:
    """A whole request in HTTP/1.1, whose body is JSON."""
    return (
        f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body


def measure(port: int, request: bytes, clients: int, seconds: float) -> dict[str, float]:
    """Requests a second, their p50 and p99 in milliseconds, and how many were not answered by 200 or 202."""
    return uvloop.run(_load(port, request, clients, seconds))


async def _load(port: int, request: bytes, clients: int, seconds: float) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    deadline = time.monotonic() + seconds
    begun = time.perf_counter()
    made = [await loop.create_connection(lambda: Client(request, deadline), "127.0.0.1", port) for _ in range(clients)]
    await asyncio.gather(*(client.done for _, client in made))
    taken = time.perf_counter() - begun
    times = sorted(second for _, client in made for second in client.seconds)
    return {
        "per_second": len(times) / taken,
        "p50_ms": 1000 * statistics.median(times),
        "p99_ms": 1000 * times[int(len(times) * 0.99)],
        "bad": sum(client.bad for _, client in made),
    }
