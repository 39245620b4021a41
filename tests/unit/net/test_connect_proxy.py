"""Tests of the CONNECT proxy's tunnels: their number, their lifetime, and that they leave nothing behind."""

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
from tests.clients.test_connect_proxy import END_OF_HEAD, open_tunnel, send_raw
from tests.support.server_process import TEST_MODELS, free_port, serving_with_proxy

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
#: More than any buffer holds.
FLOOD = bytes(20_000_000)
CHUNKED = b"POST http://fal.run/ HTTP/1.1\r\nhost: fal.run\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"


class ImpatientProxy(ConnectProxy):
    """Proxy with short timeouts."""

    idle_seconds = 0.3
    connect_seconds = 0.3


class BufferingProxy(ImpatientProxy):
    """Proxy that buffers a whole response, however little of it the client reads."""

    def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(2 * len(FLOOD))
        super()._enter(reader, writer)


class PatientProxy(ConnectProxy):
    """Proxy with an idle timeout a little longer than a busy machine delays a client."""

    idle_seconds = 2.0


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read everything, and send nothing."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(65_536):
            continue
    writer.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send everything back."""
    while received := await reader.read(65_536):
        writer.write(received)
    writer.close()


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send more than the client reads, then read everything."""
    writer.write(FLOOD)
    await silent(reader, writer)


async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send more than the client reads, and close."""
    await reader.readuntil(END_OF_HEAD)
    writer.write(FLOOD)
    writer.close()


async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Respond before the request ends, and read no more of it."""
    await reader.readuntil(END_OF_HEAD)
    writer.write(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    writer.close()


@asynccontextmanager
async def proxy_to(serve: Serve, proxy_class: type[ConnectProxy] = ConnectProxy, limit: int = 10) -> AsyncIterator[int]:
    """Yield the port of a proxy that leads fal's hosts to this server.

    An unhandled exception fails the test. At the end of the block, wait until no connection to the server is left.
    """
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    upstream = await asyncio.start_server(serve, "127.0.0.1", 0)
    upstream_port, port = upstream.sockets[0].getsockname()[1], free_port()
    proxy = proxy_class("127.0.0.1", upstream_port, upstream_port, allow_any_host=True, max_tunnels=limit)
    await proxy.open("127.0.0.1", port)
    yield port
    await proxy.close()
    await until(lambda: not any(each.raddr and each.raddr.port == upstream_port for each in connections()))
    upstream.close()
    # Unretrieved exceptions of tasks are reported when the tasks are collected.
    gc.collect()
    assert errors == []


async def connect(port: int, target: str = "fal.run:80") -> tuple[bytes, Streams]:
    """Send a CONNECT request. Return the response, and the reader and writer of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
    return await reader.readuntil(END_OF_HEAD), (reader, writer)


def connections() -> list[Any]:
    """Return the TCP connections of this process, which runs both the proxy and its clients."""
    found = psutil.Process().net_connections("tcp")
    return [each for each in found if each.status != psutil.CONN_LISTEN]


def num_connections(port: int) -> int:
    """Return the number of connections to the proxy at this port."""
    return sum(each.laddr.port == port for each in connections())


async def until(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds, because no event announces it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def running_tunnel_tasks() -> set[str]:
    """Return the names of the tunnel coroutines that still run."""
    names = {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}
    return names & {"ConnectProxy._serve", "_pipe"}


def reset(writer: asyncio.StreamWriter) -> None:
    """Abort the connection with a TCP reset."""
    tcp_socket = writer.get_extra_info("socket")
    tcp_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def test_an_idle_tunnel_is_closed() -> None:
    async def run() -> None:
        async with proxy_to(silent, ImpatientProxy) as port:
            response, (reader, writer) = await connect(port)
            assert response.startswith(b"HTTP/1.1 200 ")
            assert await reader.read() == b""
            await until(lambda: not num_connections(port) and not running_tunnel_tasks())
            writer.close()

    asyncio.run(run())


def test_an_active_tunnel_stays_open() -> None:
    """The active tunnel outlives a newer tunnel, which is closed because it is idle."""

    async def run() -> None:
        async with proxy_to(echo, PatientProxy) as port:
            _, (reader, writer) = await connect(port)
            _, (idle_reader, idle_writer) = await connect(port)
            while not idle_reader.at_eof():
                writer.write(b"still there?")
                assert await reader.readexactly(12) == b"still there?"
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await idle_reader.read()
            writer.write(b"yes")
            assert await reader.readexactly(3) == b"yes"
            writer.close()
            idle_writer.close()

    asyncio.run(run())


def test_a_response_that_the_client_does_not_read_is_dropped() -> None:
    """This holds even if the proxy has nothing left to do but send the response."""

    async def run() -> None:
        async with proxy_to(pour, BufferingProxy) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET http://fal.run/ HTTP/1.1\r\nhost: fal.run\r\n\r\n")
            assert await reader.read(1)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: not num_connections(port) and not running_tunnel_tasks())
            writer.transport.abort()

    asyncio.run(run())


def test_a_client_that_does_not_read_is_disconnected() -> None:
    async def run() -> None:
        async with proxy_to(flood, ImpatientProxy) as port:
            response, (_, writer) = await connect(port)
            assert response.startswith(b"HTTP/1.1 200 ")
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: not num_connections(port) and not running_tunnel_tasks())
            writer.transport.abort()

    asyncio.run(run())


def test_a_tunnel_beyond_the_limit_is_rejected() -> None:
    async def run() -> None:
        async with proxy_to(silent, limit=2) as port:
            tunnels = [(await connect(port))[1] for _ in range(2)]
            response, (reader, writer) = await connect(port)
            assert response.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"has 2 tunnels open, which is its limit" in await reader.read()
            writer.close()
            tunnels[0][1].close()
            await until(lambda: num_connections(port) == 1)
            response, new_tunnel = await connect(port)
            assert response.startswith(b"HTTP/1.1 200 ")
            for _, writer in (*tunnels, new_tunnel):
                writer.close()

    asyncio.run(run())


@contextmanager
def unresponsive_port() -> Iterator[int]:
    """Yield a port where connecting gets no response, because its backlog is full."""
    with socket.socket() as listener, ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_connecting_has_a_timeout() -> None:
    async def run() -> None:
        async with proxy_to(silent, ImpatientProxy) as port:
            with unresponsive_port() as unresponsive:
                response, (reader, writer) = await connect(port, f"127.0.0.1:{unresponsive}")
                assert response.startswith(b"HTTP/1.1 504 Gateway Timeout\r\n")
                assert f"127.0.0.1:{unresponsive} did not respond within".encode() in await reader.read()
                writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("disconnect", [reset, lambda writer: writer.close()], ids=["reset", "closed"])
def test_a_client_that_disconnects_during_a_chunked_body_leaves_nothing_behind(
    disconnect: Callable[[asyncio.StreamWriter], None],
) -> None:
    async def run() -> None:
        async with proxy_to(silent) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(CHUNKED)
            await until(lambda: num_connections(port) == 1 and "_pipe" in running_tunnel_tasks())
            disconnect(writer)
            await until(lambda: not num_connections(port) and not running_tunnel_tasks())

    asyncio.run(run())


def test_a_rejected_chunked_body_leaves_nothing_behind() -> None:
    """The client gets the response, and the proxy does not wait for the rest of the body."""

    async def run() -> None:
        async with proxy_to(refuse) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(CHUNKED)
            assert (await reader.read()).startswith(b"HTTP/1.1 413 ")
            await until(lambda: not num_connections(port) and not running_tunnel_tasks())
            writer.close()

    asyncio.run(run())


def test_a_server_has_as_many_tunnels_as_connections(tmp_path: Path) -> None:
    """Tunnels need open files, so a server allows at most as many tunnels as connections to a port."""
    assert MAX_TUNNELS <= 512
    with serving_with_proxy(tmp_path, TEST_MODELS, max_connections="3") as server, ExitStack() as tunnels:
        for _ in range(3):
            _, response = tunnels.enter_context(open_tunnel(server, "fal.run"))
            assert response.startswith(b"HTTP/1.1 200 ")
        rejected = send_raw(int(server.settings["PROXY_PORT"]), b"CONNECT fal.run:443 HTTP/1.1" + END_OF_HEAD)
        assert rejected.startswith(b"HTTP/1.1 503 ")
        assert b"3 tunnels" in rejected
