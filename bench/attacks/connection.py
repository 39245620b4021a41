"""HTTP/1.1 by hand, one request on each connection: an HTTP library would not leave a request unfinished."""

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

#: Bytes passed to the transport at a time: few, so that the transport does not copy bytes long before it sends them.
_CHUNK = 2**16
_LONGEST_HEAD = 2**18
#: Opcode of the frame that closes a WebSocket.
_CLOSE = 8


def request(method: str, path: str, key: str, body: bytes = b"", **headers: str) -> bytes:
    """Return a whole request with `connection: close`. Underscores in names of headers become hyphens."""
    return head(method, path, key, len(body), **headers) + body


def head(method: str, path: str, key: str, length: int, **headers: str) -> bytes:
    """Return the head of a request whose body has this length."""
    named = {
        "host": "127.0.0.1",
        "authorization": f"Key {key}",
        "content-type": "application/json",
        "content-length": str(length),
        "connection": "close",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
    return "\r\n".join([*lines, "", ""]).encode()


@dataclass(frozen=True)
class Response:
    """A response of the server."""

    status: int
    body: bytes

    @property
    def is_good(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300


class Connection:
    """One connection to the server. Its methods raise OSError and EOFError when the server closes it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, content: bytes | memoryview, rate: float = 0.0) -> None:
        """Send all of `content`, at most `rate` bytes a second unless `rate` is 0."""
        view = memoryview(content)
        chunk = int(rate / 4) if rate else _CHUNK
        for start in range(0, len(view), chunk):
            self._writer.write(view[start : start + chunk])
            await self._writer.drain()
            if rate:
                await asyncio.sleep(chunk / rate)

    async def answer(self) -> Response:
        """Read the response and return it."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").lower().split("\r\n")
        length = next((int(line.partition(":")[2]) for line in lines if line.startswith("content-length:")), 0)
        return Response(int(lines[0].split()[1]), await self._reader.readexactly(length))

    async def exchange(self, *contents: bytes | memoryview, rate: float = 0.0) -> Response:
        """Send `contents` and return the response, which may arrive before everything is sent."""
        sending = asyncio.create_task(self._send_all(contents, rate))
        try:
            return await self.answer()
        finally:
            sending.cancel()

    async def closed(self, *contents: bytes | memoryview) -> int:
        """Send `contents` over a WebSocket; skip frames until the close frame, and return its close code."""
        sending = asyncio.create_task(self._send_all(contents, 0.0))
        try:
            while True:
                first, length = await self._reader.readexactly(2)
                if length == 126:
                    (length,) = struct.unpack(">H", await self._reader.readexactly(2))
                elif length == 127:
                    (length,) = struct.unpack(">Q", await self._reader.readexactly(8))
                payload = await self._reader.readexactly(length)
                if first & 0xF == _CLOSE:
                    return int.from_bytes(payload[:2], "big")
        finally:
            sending.cancel()

    async def _send_all(self, contents: Sequence[bytes | memoryview], rate: float) -> None:
        # Ignore an error here, because the read of the response raises one too.
        with suppress(OSError):
            for content in contents:
                await self.send(content, rate)


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    """Open a connection and abort it at the end of the block. Raises OSError."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_LONGEST_HEAD)
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()
