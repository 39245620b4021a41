"""The CONNECT door's tunnels: how many there are, how long they stay, and that nothing of them is left."""

import asyncio
import contextlib
import gc
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.net.connect_proxy import MAX_TUNNELS, ConnectProxy
from tests.clients.test_connect_proxy import ENDS, entered, everything
from tests.support.server_process import TEST_MODELS, free_port, with_door

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
#: More than any buffer holds.
FLOOD = bytes(20_000_000)
CHUNKED = b"POST http://fal.run/ HTTP/1.1\r\nhost: fal.run\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"


class Brief(ConnectProxy):
    """One whose patience is short."""

    idle_seconds = 0.3
    connect_seconds = 0.3


class Hoarder(Brief):
    """One that takes the whole of an answer, however little of it is read."""

    def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(2 * len(FLOOD))
        super()._enter(reader, writer)


class Steady(ConnectProxy):
    """One whose patience is a little longer than a busy machine makes a client wait."""

    idle_seconds = 2.0


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hears all, and says nothing."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(65_536):
            continue
    writer.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says all back."""
    while said := await reader.read(65_536):
        writer.write(said)
    writer.close()


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says more than is read."""
    writer.write(FLOOD)
    await silent(reader, writer)


async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says more than is read, and goes."""
    await reader.readuntil(ENDS)
    writer.write(FLOOD)
    writer.close()


async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers a request before its end, and hears no more of it."""
    await reader.readuntil(ENDS)
    writer.write(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    writer.close()


@asynccontextmanager
async def door_to(serve: Serve, kind: type[ConnectProxy] = ConnectProxy, limit: int = 10) -> AsyncIterator[int]:
    """The port of a door that leads fal's names to this server.

    A failure that nobody hears of fails the test, and so does a connection to the server that is left.
    """
    wrong: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
    upstream = await asyncio.start_server(serve, "127.0.0.1", 0)
    there, port = upstream.sockets[0].getsockname()[1], free_port()
    door = kind("127.0.0.1", there, there, allow_any_host=True, max_tunnels=limit)
    await door.open("127.0.0.1", port)
    yield port
    await door.close()
    await until(lambda: not any(each.raddr and each.raddr.port == there for each in connections()))
    upstream.close()
    # What a task raised and nobody looked at is told of when it goes.
    gc.collect()
    assert wrong == []


async def through(port: int, target: str = "fal.run:80") -> tuple[bytes, Ends]:
    """What the door answers, and the two ends of a tunnel if there is one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
    return await reader.readuntil(ENDS), (reader, writer)


def connections() -> list[Any]:
    """Those of this process, in which both the door and its clients are."""
    found = psutil.Process().net_connections("tcp")
    return [each for each in found if each.status != psutil.CONN_LISTEN]


def held(port: int) -> int:
    """How many connections the door at this port has."""
    return sum(each.laddr.port == port for each in connections())


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what nobody tells of."""
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def tunnels_of_tasks() -> set[str]:
    """What is still being done for tunnels."""
    names = {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}
    return names & {"ConnectProxy._serve", "_pipe"}


def reset(writer: asyncio.StreamWriter) -> None:
    """Leave without a goodbye."""
    plain = writer.get_extra_info("socket")
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def test_a_tunnel_over_which_nothing_comes_is_closed() -> None:
    async def run() -> None:
        async with door_to(silent, Brief) as port:
            answer, (reader, writer) = await through(port)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert await reader.read() == b""
            await until(lambda: not held(port) and not tunnels_of_tasks())
            writer.close()

    asyncio.run(run())


def test_a_tunnel_over_which_something_comes_stays() -> None:
    """It is older than one that is closed meanwhile because nothing comes."""

    async def run() -> None:
        async with door_to(echo, Steady) as port:
            _, (reader, writer) = await through(port)
            _, (other, idle) = await through(port)
            while not other.at_eof():
                writer.write(b"still there?")
                assert await reader.readexactly(12) == b"still there?"
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await other.read()
            writer.write(b"yes")
            assert await reader.readexactly(3) == b"yes"
            writer.close()
            idle.close()

    asyncio.run(run())


def test_an_answer_that_nobody_reads_is_not_kept() -> None:
    """Also when nothing is left to do but to send it."""

    async def run() -> None:
        async with door_to(pour, Hoarder) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET http://fal.run/ HTTP/1.1\r\nhost: fal.run\r\n\r\n")
            assert await reader.read(1)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: not held(port) and not tunnels_of_tasks())
            writer.transport.abort()

    asyncio.run(run())


def test_a_client_that_reads_nothing_is_not_waited_for() -> None:
    async def run() -> None:
        async with door_to(flood, Brief) as port:
            answer, (_, writer) = await through(port)
            assert answer.startswith(b"HTTP/1.1 200 ")
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: not held(port) and not tunnels_of_tasks())
            writer.transport.abort()

    asyncio.run(run())


def test_one_tunnel_too_many_is_told_so() -> None:
    async def run() -> None:
        async with door_to(silent, limit=2) as port:
            tunnels = [(await through(port))[1] for _ in range(2)]
            answer, (reader, writer) = await through(port)
            assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"has 2 tunnels open, which is its limit" in await reader.read()
            writer.close()
            tunnels[0][1].close()
            await until(lambda: held(port) == 1)
            answer, freed = await through(port)
            assert answer.startswith(b"HTTP/1.1 200 ")
            for _, writer in (*tunnels, freed):
                writer.close()

    asyncio.run(run())


@contextmanager
def full() -> Iterator[int]:
    """A port where connecting gets no answer: as many wait there already as may."""
    with socket.socket() as listener, ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_connecting_does_not_take_for_ever() -> None:
    async def run() -> None:
        async with door_to(silent, Brief) as port:
            with full() as taken:
                answer, (reader, writer) = await through(port, f"127.0.0.1:{taken}")
                assert answer.startswith(b"HTTP/1.1 504 Gateway Timeout\r\n")
                assert f"127.0.0.1:{taken} did not respond within".encode() in await reader.read()
                writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("leave", [reset, lambda writer: writer.close()], ids=["reset", "closed"])
def test_a_client_that_leaves_in_a_body_without_length_leaves_nothing_behind(
    leave: Callable[[asyncio.StreamWriter], None],
) -> None:
    async def run() -> None:
        async with door_to(silent) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(CHUNKED)
            await until(lambda: held(port) == 1 and "_pipe" in tunnels_of_tasks())
            leave(writer)
            await until(lambda: not held(port) and not tunnels_of_tasks())

    asyncio.run(run())


def test_a_body_without_length_that_is_refused_leaves_nothing_behind() -> None:
    """The answer is heard, and the rest of the body is not waited for."""

    async def run() -> None:
        async with door_to(refuse) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(CHUNKED)
            assert (await reader.read()).startswith(b"HTTP/1.1 413 ")
            await until(lambda: not held(port) and not tunnels_of_tasks())
            writer.close()

    asyncio.run(run())


def test_there_is_room_for_the_tunnels_of_a_server(tmp_path: Path) -> None:
    """They have their share of the open files: no more of them than a port holds connections."""
    assert MAX_TUNNELS <= 512
    with with_door(tmp_path, TEST_MODELS, max_connections="3") as server, ExitStack() as tunnels:
        for _ in range(3):
            _, answer = tunnels.enter_context(entered(server, "fal.run"))
            assert answer.startswith(b"HTTP/1.1 200 ")
        refused = everything(int(server.settings["PROXY_PORT"]), b"CONNECT fal.run:443 HTTP/1.1" + ENDS)
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"3 tunnels" in refused
