"""The memory that bodies and answers on their way take: bounded in all, and for each owner."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from server.shares import Shares

#: What is smaller is not counted: as much lies in the buffers of any connection.
SMALL = 65_536
#: Seconds that somebody waits for room before being turned away.
WAIT_SECONDS = 5.0


class InFlight(Shares):
    """Bytes of them. For the event loop's thread alone."""

    def __init__(self, max_bytes: int, wait_seconds: float = WAIT_SECONDS) -> None:
        super().__init__(
            max_bytes,
            f"The bodies and answers of this key that are on their way would take more than its share of"
            f" {max_bytes // 2**20} MiB (four times --max-body-mib); send them one after the other",
        )
        self._wait_seconds = wait_seconds
        self._freed = asyncio.Event()

    def give_back(self, owner: str, number: int = 1) -> None:
        """Hold so many no more, and let those know who wait for room."""
        super().give_back(owner, number)
        self._freed.set()

    @asynccontextmanager
    async def room(self, owner: str, num_bytes: int) -> AsyncIterator[None]:
        """Hold so many while the block lasts; waits for them first. Raises TooManyRequests where that takes long."""
        # What is larger than a quarter counts as that, or it might never pass.
        num_bytes = min(num_bytes, self._total // 4) if num_bytes > SMALL else 0
        try:
            async with asyncio.timeout(self._wait_seconds):
                while not self._try_take(owner, num_bytes):
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            self.take(owner, num_bytes)
        try:
            yield
        finally:
            self.give_back(owner, num_bytes)

    @asynccontextmanager
    async def body(self, request: Request, owner: str) -> AsyncIterator[bytes]:
        """All of a request's body; it counts as the owner's until the block ends. Raises TooManyRequests."""
        # Not `Request.body`, which keeps it for as long as the request is there.
        chunks, length, stream = list[bytes](), 0, request.stream()
        async for chunk in stream:
            chunks.append(chunk)
            length += len(chunk)
            if length > SMALL:
                break
        else:
            yield b"".join(chunks)
            return
        # One of no known length may be as long as any.
        async with self.room(owner, int(request.headers.get("content-length", self._total))):
            chunks += [chunk async for chunk in stream]
            yield b"".join(chunks)
