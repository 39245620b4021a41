"""The memory of request and response bodies in flight, limited in total and per owner."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from server.errors import BodyTooLarge
from server.net.fair_share import FairShare

#: Bodies up to this many bytes are not counted: the buffers of any connection hold as much.
SMALL = 65_536
#: Seconds that a request waits for memory before it is refused.
WAIT_SECONDS = 5.0


class BytesInFlight(FairShare):
    """The limit on bytes of request and response bodies, divided between owners. Only for the event loop's thread."""

    def __init__(self, max_bytes: int, wait_seconds: float = WAIT_SECONDS) -> None:
        super().__init__(
            max_bytes,
            "This key's requests and responses in flight would take more than the key's share of the server's"
            f" {max_bytes // 2**20} MiB (four times --max-body-mib); send fewer at a time",
        )
        self._wait_seconds = wait_seconds
        self._freed = asyncio.Event()

    def release(self, owner: str, number: int = 1) -> None:
        """Release `number` bytes, and wake the requests that wait for memory."""
        super().release(owner, number)
        self._freed.set()

    @asynccontextmanager
    async def room(self, owner: str, num_bytes: int, *, is_patient: bool = False) -> AsyncIterator[None]:
        """Wait for `num_bytes` of memory, then hold it until the block ends.

        A small body holds no memory, and a large body at most a quarter of the total. Raises TooManyRequests after
        `wait_seconds`; with `is_patient`, wait without a time limit.
        """
        held = await self._wait_for(owner, num_bytes, None if is_patient else self._wait_seconds)
        try:
            yield
        finally:
            self.release(owner, held)

    @asynccontextmanager
    async def stream(
        self, request: Request, owner: str, max_bytes: int | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Yield an iterator that returns the parts of a request's body as they arrive.

        The body counts towards the owner's share of memory until the block ends. The iterator raises BodyTooLarge for
        more than `max_bytes`, and TooManyRequests if no memory becomes free in time.
        """
        length = held = 0

        async def parts() -> AsyncIterator[bytes]:
            nonlocal length, held
            # Do not use `Request.body`, which keeps the body for as long as the request exists.
            async for part in request.stream():
                length += len(part)
                if max_bytes is not None and length > max_bytes:
                    raise BodyTooLarge(f"The body is larger than {max_bytes} bytes")
                if length > SMALL and not held:
                    # A body without a content-length could have any length, so hold as much as a body may hold.
                    expected = int(request.headers.get("content-length", self._total))
                    held = await self._wait_for(owner, expected, self._wait_seconds)
                yield part
            # The body may be shorter than expected. Release the bytes that did not arrive.
            self.release(owner, held - min(held, length))
            held = min(held, length)

        try:
            yield parts()
        finally:
            self.release(owner, held)

    @asynccontextmanager
    async def body(self, request: Request, owner: str, max_bytes: int | None = None) -> AsyncIterator[bytes]:
        """Yield a request's whole body. Counts the body, and raises, as `stream` does."""
        async with self.stream(request, owner, max_bytes) as parts:
            yield b"".join([part async for part in parts])

    async def _wait_for(self, owner: str, num_bytes: int, seconds: float | None) -> int:
        """Wait until the bytes can be held; return how many are held, 0 for a small body. Raises TooManyRequests."""
        # At most a quarter of the total, because an owner cannot get more while another owner holds half of the total.
        num_bytes = min(num_bytes, self._total // 4) if num_bytes > SMALL else 0
        try:
            async with asyncio.timeout(seconds):
                while not self._try_acquire(owner, num_bytes):
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            # Raises TooManyRequests, unless memory became free at the last moment.
            self.acquire(owner, num_bytes)
        return num_bytes
