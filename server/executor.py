"""A thread pool that keys share fairly: a busy key leaves threads for the others."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

Result = TypeVar("Result")


class FairExecutor:
    """A thread pool for slow or blocking functions. Limits how many threads each owner uses at once."""

    def __init__(self, name: str, num_threads: int, num_each: int) -> None:
        """Create the pool; one owner may use up to `num_each` of its threads."""
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._permits = defaultdict[str, asyncio.Semaphore](partial(asyncio.Semaphore, num_each))
        #: The tasks of `submit`, because the event loop itself keeps only weak references to tasks.
        self._running: set[asyncio.Future[object]] = set()

    async def run(self, owner: str, func: Callable[..., Result], *args: object) -> Result:
        """Run `func` as soon as one of the owner's threads is free; return its result. Raises what `func` raises.

        A call that has started runs to its end and occupies its thread, even if the caller is cancelled.
        """
        permit = self._permits[owner]
        await permit.acquire()
        try:
            work = asyncio.get_running_loop().run_in_executor(self._threads, func, *args)
        except BaseException:
            permit.release()
            raise
        work.add_done_callback(lambda _: permit.release())
        return await asyncio.shield(work)

    def submit(self, owner: str, func: Callable[..., object], *args: object) -> None:
        """Schedule `run` and return at once; the result is dropped."""
        task: asyncio.Future[object] = asyncio.ensure_future(self.run(owner, func, *args))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
