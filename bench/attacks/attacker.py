"""The attacker's process: prepares one attack, then carries it out whenever it is told to, and counts what it hears."""

import asyncio
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import uvloop

from bench.attacks import ATTACKER
from bench.attacks.connection import Answer, Connection, connected, request
from bench.attacks.victim import OPERATIONS

#: What is done in one phase of an attack; it begins with everything prepared.
Round = Callable[[], Coroutine[None, None, None]]
#: What is done with one request of many.
Act = Callable[[bytes], Coroutine[None, None, object]]


@dataclass(frozen=True)
class Attack:
    """What one client does. `prepare` is called once, before the first phase, and gives what each phase does."""

    name: str
    about: str
    prepare: Callable[["Target"], Round]
    #: Of the server, beside keys.
    settings: Mapping[str, str] = field(default_factory=dict)
    #: What the other key does meanwhile.
    operations: Sequence[str] = OPERATIONS


@dataclass
class Told:
    """What the attacker was told until now."""

    #: How many connections ended so: a status, "closed" for one that was closed without an answer, "held" for one that
    #: was open still at the end of the phase, or the code that a WebSocket was closed with.
    answers: Counter[str] = field(default_factory=Counter)
    longest_held: float = 0.0
    #: What else is worth telling.
    notes: dict[str, Any] = field(default_factory=dict)


class Target:
    """The server, as an attack sees it."""

    def __init__(self, port: int, folder: Path, hosted_url: str) -> None:
        self.port, self._folder, self._hosted_url = port, folder, hosted_url
        self.told = Told()
        self._until = 0.0

    def hosted(self, name: str, content: bytes) -> str:
        """The address of a file that is there to be downloaded from now on."""
        (self._folder / name).write_bytes(content)
        return self.address(name)

    def address(self, path: str) -> str:
        """Of something on the attacker's own web server."""
        return f"{self._hosted_url}/{path}"

    def post(self, path: str, fields: Mapping[str, Any], **headers: str) -> bytes:
        """A request with a body of JSON."""
        return request("POST", path, ATTACKER, json.dumps(fields, ensure_ascii=False).encode(), **headers)

    async def round(self, act: Round, seconds: float) -> None:
        """One phase, which ends after so many seconds at the latest."""
        self._until = time.monotonic() + seconds
        await act()

    @property
    def is_over(self) -> bool:
        """Whether the phase is."""
        return time.monotonic() >= self._until

    async def talk(self, words: Callable[[Connection], Coroutine[None, None, str]], label: str = "") -> None:
        """One connection, held until these words are over or the phase is; how it ended is counted under this label."""
        begun_at, ending = time.monotonic(), "closed"
        try:
            async with asyncio.timeout(max(0.0, self._until - begun_at)), connected(self.port) as connection:
                ending = await words(connection)
        except TimeoutError:
            ending = "held"
        except (OSError, EOFError):
            pass
        self.told.answers[f"{label} {ending}".strip()] += 1
        self.told.longest_held = max(self.told.longest_held, time.monotonic() - begun_at)

    async def ask(self, *contents: bytes | memoryview, rate: float = 0.0, label: str = "") -> Answer | None:
        """One request on a connection of its own, counted under this label; its answer, if there was one."""
        heard: list[Answer] = []

        async def words(connection: Connection) -> str:
            heard.append(await connection.exchange(*contents, rate=rate))
            return str(heard[0].status)

        await self.talk(words, label)
        return heard[0] if heard else None

    async def flood(self, requests: Iterable[bytes], at_a_time: int, act: Act | None = None) -> None:
        """Ask these, or do this with each, so many at a time, until there are no more or the phase is over."""
        left = iter(requests)

        async def one_after_the_other() -> None:
            for content in left:
                await (act or self.ask)(content)
                if self.is_over:
                    return

        await asyncio.gather(*(one_after_the_other() for _ in range(at_a_time)))


class Attacker:
    """The process that `attacking` runs."""

    def __init__(self, process: multiprocessing.process.BaseProcess, pipe: Pipe) -> None:
        self._process, self._pipe = process, pipe

    def begin(self, seconds: float) -> None:
        """Begin a phase of so many seconds at most."""
        self._pipe.send(seconds)

    def is_done(self, wait: float) -> bool:
        """Whether the phase is over, after waiting for so long."""
        return self._pipe.poll(wait)

    def told(self) -> Told:
        """What it was told until the end of the phase."""
        told: Told = self._pipe.recv()
        return told

    def end(self) -> None:
        """At once, with all its connections."""
        self._process.kill()
        self._process.join()


@contextmanager
def attacking(prepare: Callable[[Target], Round], port: int, folder: Path, hosted_url: str) -> Iterator[Attacker]:
    """An attacker that has prepared itself."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_attack, args=(there, prepare, port, folder, hosted_url), daemon=True)
    process.start()
    # So that the end of the process is heard here.
    there.close()
    attacker = Attacker(process, here)
    try:
        here.recv()
        yield attacker
    finally:
        attacker.end()


def _attack(pipe: Pipe, prepare: Callable[[Target], Round], port: int, folder: Path, hosted_url: str) -> None:
    os.nice(19)
    target = Target(port, folder, hosted_url)
    act = prepare(target)
    pipe.send(None)
    while True:
        uvloop.run(target.round(act, pipe.recv()))
        pipe.send(target.told)
