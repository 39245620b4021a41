"""A thread pool in which each owner may use only a few threads at once."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

Result = TypeVar("Result")


class FairExecutor:
    """A thread pool for slow or blocking functions. One owner cannot use all threads, but several busy owners can."""

    def __init__(self, name: str, num_threads: int, num_each: int) -> None:
        """Create a pool of `num_threads` threads, of which one owner may use up to `num_each` at once."""
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._permits = defaultdict[str, asyncio.Semaphore](partial(asyncio.Semaphore, num_each))
        #: Keeps the tasks of `submit` alive, because the event loop itself has only weak references to tasks.
        self._running: set[asyncio.Future[object]] = set()

    async def run(self, owner: str, func: Callable[..., Result], *args: object) -> Result:
        """Run `func` in a thread and return its result. Raises what `func` raises.

        The call waits while the owner uses `num_each` threads, or while no thread is free.

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
        """Schedule `run` and return at once; the result of `func` is dropped."""
        task: asyncio.Future[object] = asyncio.ensure_future(self.run(owner, func, *args))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
