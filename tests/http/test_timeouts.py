"""Clients that take too long, each on a real socket."""

import asyncio
import contextlib
import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import uvloop
from websockets.sync.client import connect

from server.net import tls
from server.net.listeners import raise_open_file_limit
from server.net.timeouts import TimeoutProtocol, limit_tls_handshake, with_limits
from tests.support.server_process import TEST_MODELS, serving
from tests.support.slow_clients import few_files

LARGE = b"x" * 50_000_000


#: Streams of /quiet that wait for somebody to ask for /speak.
quiet = list[asyncio.Event]()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Reads what comes, then answers with its length; /large with more than any buffer holds."""
    if scope["type"] == "websocket":
        await echo(receive, send)
        return
    if scope["path"] == "/quiet":
        await stream(send)
        return
    while scope["path"] == "/speak" and quiet:
        quiet.pop().set()
    if scope["path"] == "/later":
        quiet.append(asyncio.Event())
        await quiet[-1].wait()
    length, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    body = LARGE if scope["path"] == "/large" else str(length).encode()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]}
    )
    for start in range(0, len(body), 65_536):
        await send({"type": "http.response.body", "body": body[start : start + 65_536], "more_body": True})
    await send({"type": "http.response.body"})


async def stream(send: Any) -> None:
    """Something at once, the rest when it may."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": b"first", "more_body": True})
    quiet.append(asyncio.Event())
    await quiet[-1].wait()
    await send({"type": "http.response.body", "body": b"last"})


async def echo(receive: Any, send: Any) -> None:
    """Says back what it hears."""
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] != "websocket.disconnect":
        await send({"type": "websocket.send", "text": message["text"]})


class _Listener(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def listening(protocol: type[TimeoutProtocol], **more: Any) -> Iterator[int]:
    """A port where this protocol is spoken."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        options: dict[str, Any] = {"lifespan": "off", "log_level": "warning", "timeout_graceful_shutdown": 1, **more}
        listener = _Listener(uvicorn.Config(app, http=protocol, **options))
        thread = threading.Thread(target=lambda: asyncio.run(listener.serve([bound])))
        thread.start()
        try:
            yield bound.getsockname()[1]
        finally:
            listener.should_exit = True
            thread.join()


def answered(connection: socket.socket) -> bool:
    """Whether a request gets its answer on this connection."""
    connection.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    said = b""
    while not said.endswith(b"\r\n\r\n0"):
        said += connection.recv(65_536)
    return said.startswith(b"HTTP/1.1 200")


def is_cut_off(connection: socket.socket) -> bool:
    """Wait until the server ends it; a socket that never ends fails by its timeout."""
    connection.settimeout(30)
    try:
        while connection.recv(65_536):
            continue
    except ConnectionResetError:
        pass
    return True


QUICK = {"header_timeout": 0.3, "body_timeout": 0.3, "write_timeout": 0.3}
POST = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 1000000\r\n\r\n"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET",
        b"GET / HTTP/1.1\r\nHost: he",
        POST,
        POST + b"x" * 100,
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\nGET / HT",
    ],
    ids=["silent", "half a line", "half a header", "no body", "half a body", "half a second request"],
)
def test_whoever_stops_in_the_middle_is_cut_off(said: bytes) -> None:
    with listening(with_limits(**QUICK)) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(said)
        assert is_cut_off(connection)


@pytest.mark.parametrize("first", [b"", POST], ids=["header", "body"])
def test_a_byte_now_and_then_is_not_enough(first: bytes) -> None:
    """However often one comes."""
    with listening(with_limits(**QUICK)) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(first)
        connection.settimeout(0.02)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                connection.sendall(b"G")
                with contextlib.suppress(TimeoutError):
                    if connection.recv(1) == b"":
                        raise ConnectionResetError


def test_what_came_fast_earns_no_long_silence() -> None:
    """By the average alone it had a minute left."""
    protocol = with_limits(body_timeout=3600.0, gap_seconds=0.3)
    with listening(protocol) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(POST + b"x" * 999_999)
        assert is_cut_off(connection)


def test_a_silence_of_the_servers_own_is_not_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not read, until it is told to by another request."""
    protocol = with_limits(body_timeout=0.3, gap_seconds=0.3)
    with listening(protocol) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(30)
        looks = threading.Semaphore(0)
        late = protocol._on_timeout

        def looked(self: TimeoutProtocol) -> None:
            late(self)
            looks.release()

        monkeypatch.setattr(protocol, "_on_timeout", looked)
        connection.sendall(POST.replace(b"POST /", b"POST /later") + b"x" * 1_000_000)
        for _ in range(3):
            assert looks.acquire(timeout=30)
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.sendall(b"GET /speak HTTP/1.1\r\nHost: here\r\n\r\n")
            said = b""
            while not said.endswith(b"1000000"):
                said += (part := connection.recv(1000))
                assert part


CHUNKED = b"POST / HTTP/1.1\r\nHost: here\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
GET = b"GET / HTTP/1.1\r\nHost: here\r\n"


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /", b"a"),
        (b"GET / HTTP/1.1\r\nX-A: ", b"a"),
        (GET, b"X: y\r\n"),
        (GET + b"\r\nGET /", b"a"),
        (CHUNKED + b"0\r\nX-A: ", b"a"),
        (CHUNKED + b"0\r\n", b"X: y\r\n"),
        (CHUNKED + b"1;", b"a"),
    ],
    ids=["line", "header", "headers", "second line", "trailer", "trailers", "chunk extension"],
)
def test_a_header_without_end_is_not_kept(start: bytes, more: bytes) -> None:
    """However much time there would be; neither is what comes in its form after a body, or within one."""
    patient = with_limits(header_timeout=3600.0, body_timeout=3600.0)
    with listening(patient) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(30)
        connection.sendall(start)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(100):
                connection.sendall(more * (65_536 // len(more)))


def test_a_body_in_the_smallest_chunks_is_well() -> None:
    """Six times as much is said about it as there is of it; with trailers that are short, too."""
    with listening(TimeoutProtocol) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(60)
        connection.sendall(CHUNKED + b"1\r\na\r\n" * 199_999 + b"0\r\nX-A: b\r\n\r\n")
        said = b""
        while more := connection.recv(65_536):
            said += more
    assert said.endswith(b"\r\n\r\n200000")


def test_a_long_header_and_a_large_body_that_come_together_are_well() -> None:
    with listening(TimeoutProtocol) as port, httpx.Client(timeout=60, trust_env=False) as client:
        for _ in range(2):
            headers = {"x-long": "a" * 40_000}
            answer = client.post(f"http://127.0.0.1:{port}/", content=b"x" * 5_000_000, headers=headers)
            assert answer.text == "5000000"


def test_an_answer_that_nobody_reads(tmp_path: Any) -> None:
    with listening(with_limits(**QUICK)) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n")
        # Nothing is read until the server has given up: its end shows as a reset, or an end before all has come.
        peer_left = threading.Event()

        def watch() -> None:
            while not peer_left.is_set():
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
                # Anything but ESTABLISHED.
                if info[0] != 1:
                    peer_left.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert peer_left.wait(30)
        watcher.join()


def test_a_body_may_be_slow_if_it_is_steady() -> None:
    """Ten times as long as the limit for one that stands still, at twice the rate that is asked for."""
    protocol = with_limits(header_timeout=5.0, body_timeout=0.2, body_rate=50_000)
    with listening(protocol) as port, httpx.Client(timeout=60, trust_env=False) as client:
        wait = threading.Event()

        def dripped() -> Iterator[bytes]:
            for _ in range(40):
                wait.wait(0.05)
                yield b"x" * 5_000

        answer = client.post(f"http://127.0.0.1:{port}/", content=dripped())
    assert answer.text == "200000"


#: Longer than anything may take that is QUICK.
LONG = 1.0


def stays_open(connection: socket.socket) -> None:
    """Nothing comes for long, not even the end."""
    connection.settimeout(LONG)
    with pytest.raises(TimeoutError):
        connection.recv(65_536)
    connection.settimeout(30)


def test_whoever_thinks_between_requests_is_not_hurried() -> None:
    """Only the usual keep-alive ends an idle connection; a request of its own has all of its time."""
    with listening(with_limits(**QUICK)) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(2):
            assert answered(connection)
            stays_open(connection)
        assert answered(connection)


def test_a_stream_may_be_quiet_for_long() -> None:
    with listening(with_limits(**QUICK)) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(30)
        connection.sendall(b"POST /quiet HTTP/1.1\r\nHost: here\r\nContent-Length: 1\r\n\r\nx")
        said = b""
        while b"first" not in said:
            said += connection.recv(65_536)
        stays_open(connection)
        httpx.get(f"http://127.0.0.1:{port}/speak", trust_env=False)
        while more := connection.recv(65_536):
            said += more
    assert b"last" in said


def test_a_web_socket_may_be_quiet_for_long() -> None:
    with (
        listening(with_limits(**QUICK)) as port,
        connect(f"ws://127.0.0.1:{port}/", proxy=None, open_timeout=60) as connection,
    ):
        with pytest.raises(TimeoutError):
            connection.recv(timeout=LONG)
        connection.send("a word")
        assert connection.recv(timeout=60) == "a word"


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_handshake_that_does_not_begin(tmp_path: Path, loop_factory: Any) -> None:
    """And a port without TLS, which knows none, is opened as before."""
    files = tls.ensure_certificate(tmp_path, "127.0.0.1", "")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)

    async def wait() -> bytes:
        loop = asyncio.get_running_loop()
        limit_tls_handshake(loop, 0.3)
        plain = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0, ssl=context)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        async with asyncio.timeout(30):
            said = await reader.read()
        for each in (plain, server, writer):
            each.close()
        return said

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(wait()) == b""


def test_one_connection_too_many() -> None:
    with listening(with_limits(max_connections=2)) as port:
        address = ("127.0.0.1", port)
        with socket.create_connection(address) as first, socket.create_connection(address) as second:
            assert answered(first) and answered(second)
            with socket.create_connection(address) as third:
                assert is_cut_off(third)
            assert answered(first)


def test_more_connections_than_files_at_first(tmp_path: Path) -> None:
    """Most systems start a program with 1024 open files, and let it have more."""
    with contextlib.ExitStack() as opened:
        with few_files(64):
            server = opened.enter_context(serving(tmp_path, TEST_MODELS))
        host, port = server.ready().url.removeprefix("http://").split(":")
        held = [opened.enter_context(socket.create_connection((host, int(port)))) for _ in range(100)]
        for connection in held:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")


def test_fewer_files_than_connections(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where the system gives no more, fewer connections are held, and somebody is told."""
    given = list[Any]()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
    assert raise_open_file_limit(4096, 2) == 128
    assert given == [(1024, 1024)]
    assert "a port holds 128 connections" in caplog.text
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    assert raise_open_file_limit(4096, 2) == 4096
    assert given[1:] == [(16_896, resource.RLIM_INFINITY)]


def test_the_server_speaks_it(tmp_path: Any) -> None:
    """With as many connections as its setting says, and no more."""
    with serving(tmp_path, TEST_MODELS, max_connections="3") as server:
        host, port = server.ready().url.removeprefix("http://").split(":")
        held = [socket.create_connection((host, int(port))) for _ in range(3)]
        for connection in held:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        with socket.create_connection((host, int(port))) as fourth:
            assert is_cut_off(fourth)
        for connection in held:
            connection.close()
