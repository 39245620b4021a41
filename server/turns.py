"""Threads that owners share: however much one has to do, another's turn comes soon."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

Result = TypeVar("Result")


class Turns:
    """Work that waits for a disk or takes long, off the event loop; of one owner no more than so much at a time."""

    def __init__(self, name: str, num_threads: int, num_each: int) -> None:
        """`num_each` is how many of the threads one owner may have."""
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._of = defaultdict[str, asyncio.Semaphore](partial(asyncio.Semaphore, num_each))

    async def run(self, owner: str, act: Callable[..., Result], *given: object) -> Result:
        """Do this for an owner, in its turn. Once begun it is done, whoever is gone by then."""
        async with self._of[owner]:
            return await asyncio.get_running_loop().run_in_executor(self._threads, act, *given)
