"""The memory that bodies and answers on their way take: bounded in all, and for each owner."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from server.errors import BodyTooLarge
from server.net.fair_share import FairShare

#: What is smaller is not counted: as much lies in the buffers of any connection.
SMALL = 65_536
#: Seconds that somebody waits for room before being turned away.
WAIT_SECONDS = 5.0


class BytesInFlight(FairShare):
    """Bytes of bodies and answers, divided between owners. For the event loop's thread alone."""

    def __init__(self, max_bytes: int, wait_seconds: float = WAIT_SECONDS) -> None:
        super().__init__(
            max_bytes,
            f"The bodies and answers of this key that are on their way would take more than its share of"
            f" {max_bytes // 2**20} MiB (four times --max-body-mib); send them one after the other",
        )
        self._wait_seconds = wait_seconds
        self._freed = asyncio.Event()

    def release(self, owner: str, number: int = 1) -> None:
        """Hold so many no more, and let those know who wait for room."""
        super().release(owner, number)
        self._freed.set()

    @asynccontextmanager
    async def room(self, owner: str, num_bytes: int, *, is_patient: bool = False) -> AsyncIterator[None]:
        """Hold so many while the block lasts; waits for them first, with `is_patient` for as long as it takes.

        Raises TooManyRequests.
        """
        held = await self._wait_for(owner, num_bytes, None if is_patient else self._wait_seconds)
        try:
            yield
        finally:
            self.release(owner, held)

    @asynccontextmanager
    async def body(self, request: Request, owner: str, max_bytes: int | None = None) -> AsyncIterator[bytes]:
        """All of a request's body; it counts as the owner's until the block ends.

        Raises TooManyRequests, and BodyTooLarge for more than `max_bytes`.
        """
        # Not `Request.body`, which keeps it for as long as the request is there.
        chunks, length, held, stream = list[bytes](), 0, 0, request.stream()
        try:
            async for chunk in stream:
                chunks.append(chunk)
                length += len(chunk)
                if max_bytes is not None and length > max_bytes:
                    raise BodyTooLarge(f"The body is larger than {max_bytes} bytes")
                if length > SMALL and not held:
                    # One of no known length may be as long as any.
                    expected = int(request.headers.get("content-length", self._total))
                    held = await self._wait_for(owner, expected, self._wait_seconds)
            body = b"".join(chunks)
            chunks.clear()
            # What was expected and did not come is free again.
            self.release(owner, held - min(held, length))
            held = min(held, length)
            yield body
        finally:
            self.release(owner, held)

    async def _wait_for(self, owner: str, num_bytes: int, seconds: float | None) -> int:
        """How many are held, once there is room: what is small needs none. Raises TooManyRequests."""
        # A quarter at most, because no owner could ever hold more than half of it all.
        num_bytes = min(num_bytes, self._total // 4) if num_bytes > SMALL else 0
        try:
            async with asyncio.timeout(seconds):
                while not self._try_acquire(owner, num_bytes):
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            self.acquire(owner, num_bytes)
        return num_bytes
