"""The attacker's process: it prepares one attack, runs a phase on each command, and counts the responses."""

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
from bench.attacks.connection import Connection, Response, connected, request
from bench.attacks.victim import OPERATIONS

#: The action of one phase of an attack, run after the preparation.
Round = Callable[[], Coroutine[None, None, None]]
#: An action to take with each of many requests.
Act = Callable[[bytes], Coroutine[None, None, object]]


@dataclass(frozen=True)
class Attack:
    """An attack by one client. `prepare` is called once, before the first phase, and returns the action of a phase."""

    name: str
    about: str
    prepare: Callable[["Target"], Round]
    #: Settings of the server, apart from keys.
    settings: Mapping[str, str] = field(default_factory=dict)
    #: Operations of the other key during the attack.
    operations: Sequence[str] = OPERATIONS


@dataclass
class Responses:
    """The responses that the attacker has received so far."""

    #: Number of connections by how they ended: the status of the response, "closed" if there was none, "held" if the
    #: connection was still open when the phase ended, or the code that closed a WebSocket. A label may come first.
    answers: Counter[str] = field(default_factory=Counter)
    #: Seconds that the longest connection was open.
    longest_held: float = 0.0
    #: Further facts for the report.
    notes: dict[str, Any] = field(default_factory=dict)


class Target:
    """The server, as an attack sees it."""

    def __init__(self, port: int, directory: Path, hosted_url: str) -> None:
        self.port, self._directory, self._hosted_url = port, directory, hosted_url
        self.responses = Responses()
        self._until = 0.0

    def host_file(self, name: str, content: bytes) -> str:
        """Offer a file for download from now on; return its URL."""
        (self._directory / name).write_bytes(content)
        return self.url(name)

    def url(self, path: str) -> str:
        """Return the URL of a path on the attacker's own web server."""
        return f"{self._hosted_url}/{path}"

    def post(self, path: str, fields: Mapping[str, Any], **headers: str) -> bytes:
        """Return a POST request of the attacker with a JSON body."""
        return request("POST", path, ATTACKER, json.dumps(fields, ensure_ascii=False).encode(), **headers)

    async def round(self, act: Round, seconds: float) -> None:
        """Run one phase, which ends after `seconds` at the latest."""
        self._until = time.monotonic() + seconds
        await act()

    @property
    def is_over(self) -> bool:
        """Whether the phase is over."""
        return time.monotonic() >= self._until

    async def talk(self, conversation: Callable[[Connection], Coroutine[None, None, str]], label: str = "") -> None:
        """Hold one connection until `conversation` or the phase ends; count under `label` how the connection ended."""
        start, ending = time.monotonic(), "closed"
        try:
            async with asyncio.timeout(max(0.0, self._until - start)), connected(self.port) as connection:
                ending = await conversation(connection)
        except TimeoutError:
            ending = "held"
        except (OSError, EOFError):
            pass
        self.responses.answers[f"{label} {ending}".strip()] += 1
        self.responses.longest_held = max(self.responses.longest_held, time.monotonic() - start)

    async def ask(self, *contents: bytes | memoryview, rate: float = 0.0, label: str = "") -> Response | None:
        """Send one request on a new connection and count the response under `label`; return it if there was one."""
        responses: list[Response] = []

        async def conversation(connection: Connection) -> str:
            responses.append(await connection.exchange(*contents, rate=rate))
            return str(responses[0].status)

        await self.talk(conversation, label)
        return responses[0] if responses else None

    async def flood(self, requests: Iterable[bytes], at_a_time: int, act: Act | None = None) -> None:
        """Send requests, or pass each to `act`, `at_a_time` at once, until none is left or the phase is over."""
        remaining = iter(requests)

        async def send_in_turn() -> None:
            for content in remaining:
                await (act or self.ask)(content)
                if self.is_over:
                    return

        await asyncio.gather(*(send_in_turn() for _ in range(at_a_time)))


class Attacker:
    """A handle to the process that `attacking` runs."""

    def __init__(self, process: multiprocessing.process.BaseProcess, pipe: Pipe) -> None:
        self._process, self._pipe = process, pipe

    def begin(self, seconds: float) -> None:
        """Start a phase of at most `seconds`."""
        self._pipe.send(seconds)

    def is_done(self, wait: float) -> bool:
        """Wait up to `wait` seconds; return whether the phase is over."""
        return self._pipe.poll(wait)

    def responses(self) -> Responses:
        """Return the responses up to the end of the phase."""
        responses: Responses = self._pipe.recv()
        return responses

    def end(self) -> None:
        """Kill the process, which closes all its connections."""
        self._process.kill()
        self._process.join()


@contextmanager
def attacking(prepare: Callable[[Target], Round], port: int, directory: Path, hosted_url: str) -> Iterator[Attacker]:
    """Run an attacker until the block ends; the block starts once the attack is prepared."""
    context = multiprocessing.get_context("spawn")
    parent_pipe, child_pipe = context.Pipe()
    process = context.Process(target=_attack, args=(child_pipe, prepare, port, directory, hosted_url), daemon=True)
    process.start()
    # Close the copy of the child's end in this process, so that reading fails if the child ends.
    child_pipe.close()
    attacker = Attacker(process, parent_pipe)
    try:
        parent_pipe.recv()
        yield attacker
    finally:
        attacker.end()


def _attack(pipe: Pipe, prepare: Callable[[Target], Round], port: int, directory: Path, hosted_url: str) -> None:
    os.nice(19)
    target = Target(port, directory, hosted_url)
    act = prepare(target)
    pipe.send(None)
    while True:
        uvloop.run(target.round(act, pipe.recv()))
        pipe.send(target.responses)
