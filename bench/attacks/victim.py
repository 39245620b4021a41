"""The other key's process: it polls, submits and uploads at a fixed rate, and records how long each operation took."""

import asyncio
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from urllib.parse import urlsplit

import uvloop

from bench.attacks import OTHER
from bench.attacks.connection import Response, connected, request

OPERATIONS = ("status", "submit", "upload")
#: Operations a second, all kinds together. Each starts on time, even if earlier ones are still in progress.
RATE = 30
#: Seconds after which an operation counts as never answered.
PATIENCE = 20.0
_FILE = bytes(100_000)
#: Submits are small and uploads expire soon, so that this key itself stores little.
SUBMIT = json.dumps({"prompt": "x", "num_inference_steps": 1, "image_size": {"width": 64, "height": 64}}).encode()
_EXPIRES = {"x_fal_object_lifecycle": "2"}


@dataclass(frozen=True)
class Operation:
    """A completed operation: its start by the monotonic clock, its duration, and its last response."""

    kind: str
    begun_at: float
    seconds: float
    #: A status, "closed" if the connection ended without a response, or "late" after `PATIENCE`.
    answer: str


class OtherKey:
    """A handle to the process that `running_other_key` runs; `stop` ends the process."""

    def __init__(self, pipe: Pipe, is_over: Event, num_waiting: "Synchronized[int]") -> None:
        self._pipe, self._is_over, self._num_waiting = pipe, is_over, num_waiting

    def waiting(self) -> int:
        """Return the number of operations in progress."""
        return int(self._num_waiting.value)

    def stop(self) -> list[Operation]:
        """Start no further operation, wait for those in progress, and return all operations."""
        self._is_over.set()
        operations: list[Operation] = self._pipe.recv()
        return operations


@contextmanager
def running_other_key(port: int, kinds: Sequence[str], status_path: str) -> Iterator[OtherKey]:
    """Run the other key's operations in a separate process, until the block ends. Polls start with `status_path`."""
    context = multiprocessing.get_context("spawn")
    parent_pipe, child_pipe = context.Pipe()
    is_over, num_waiting = context.Event(), context.Value("i", 0)
    actor = _Actor(port, status_path, num_waiting)
    process = context.Process(target=_act, args=(child_pipe, is_over, actor, kinds), daemon=True)
    process.start()
    # Close the copy of the child's end in this process, so that reading fails if the child ends.
    child_pipe.close()
    try:
        yield OtherKey(parent_pipe, is_over, num_waiting)
    finally:
        process.kill()
        process.join()


def _act(pipe: Pipe, is_over: Event, actor: "_Actor", kinds: Sequence[str]) -> None:
    pipe.send(uvloop.run(actor.act(kinds, is_over.is_set)))


class _Actor:
    def __init__(self, port: int, status_path: str, num_waiting: "Synchronized[int]") -> None:
        self._port, self._status_path, self._num_waiting = port, status_path, num_waiting
        self._operations: list[Operation] = []

    async def act(self, kinds: Sequence[str], is_over: Callable[[], bool]) -> list[Operation]:
        """Run the kinds of operations in turn, until `is_over`; return all operations."""
        acts = {"status": self._status, "submit": self._submit, "upload": self._upload}
        start, running = time.monotonic(), set[asyncio.Task[None]]()
        for number in itertools.count():
            await asyncio.sleep(start + number / RATE - time.monotonic())
            if is_over():
                break
            kind = kinds[number % len(kinds)]
            task = asyncio.create_task(self._timed(kind, acts[kind]))
            running.add(task)
            task.add_done_callback(running.discard)
            self._num_waiting.value = len(running)
        await asyncio.gather(*running)
        return self._operations

    async def _timed(self, kind: str, act: Callable[[], Coroutine[None, None, Response]]) -> None:
        begun_at, answer = time.monotonic(), "closed"
        try:
            async with asyncio.timeout(PATIENCE):
                answer = str((await act()).status)
        except TimeoutError:
            answer = "late"
        except (OSError, EOFError):
            pass
        self._operations.append(Operation(kind, begun_at, time.monotonic() - begun_at, answer))

    async def _status(self) -> Response:
        return await self._ask(request("GET", self._status_path, OTHER))

    async def _submit(self) -> Response:
        answer = await self._ask(request("POST", "/queue/bench/null", OTHER, SUBMIT))
        if answer.is_good:
            self._status_path = urlsplit(json.loads(answer.body)["status_url"]).path
        return answer

    async def _upload(self) -> Response:
        declaration = json.dumps({"content_type": "image/png", "file_name": "a.png"}).encode()
        initiated = await self._ask(request("POST", "/storage/upload/initiate", OTHER, declaration, **_EXPIRES))
        if not initiated.is_good:
            return initiated
        path = urlsplit(json.loads(initiated.body)["upload_url"]).path
        return await self._ask(request("PUT", path, OTHER, _FILE))

    async def _ask(self, content: bytes) -> Response:
        async with connected(self._port) as connection:
            return await connection.exchange(content)
