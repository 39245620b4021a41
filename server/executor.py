"""Threads that keys share: a key that has much to do leaves threads to the others."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

Result = TypeVar("Result")


class FairExecutor:
    """Runs what waits for a disk, or takes long, off the event loop: so much of one owner at a time, and no more."""

    def __init__(self, name: str, num_threads: int, num_each: int) -> None:
        """`num_each` is how many of the threads one owner may have."""
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._of = defaultdict[str, asyncio.Semaphore](partial(asyncio.Semaphore, num_each))
        self._begun: set[asyncio.Future[object]] = set()

    async def run(self, owner: str, func: Callable[..., Result], *args: object) -> Result:
        """Do this for an owner, in its turn. Raises what `func` does.

        Once begun it is done, and its thread is taken until then, also where the caller is cancelled meanwhile.
        """
        turn = self._of[owner]
        await turn.acquire()
        try:
            work = asyncio.get_running_loop().run_in_executor(self._threads, func, *args)
        except BaseException:
            turn.release()
            raise
        work.add_done_callback(lambda _: turn.release())
        return await asyncio.shield(work)

    def submit(self, owner: str, act: Callable[..., object], *given: object) -> None:
        """As `run`, for nobody who waits for it."""
        task: asyncio.Future[object] = asyncio.ensure_future(self.run(owner, act, *given))
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
