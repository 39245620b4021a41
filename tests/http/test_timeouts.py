"""Clients that take too long, over real sockets."""

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
from tests.support.slow_clients import limited_open_files

LARGE = b"x" * 50_000_000

#: Requests that wait for a request to /speak: to /later, with an unread body, and to /quiet, with half an answer.
waiting = list[asyncio.Event]()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Read the body, then answer with its length; answer /large with more bytes than any buffer holds."""
    if scope["type"] == "websocket":
        await echo(receive, send)
        return
    if scope["path"] == "/quiet":
        await stream(send)
        return
    while scope["path"] == "/speak" and waiting:
        waiting.pop().set()
    if scope["path"] == "/later":
        waiting.append(asyncio.Event())
        await waiting[-1].wait()
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
    """Send the first part of an answer at once, and the rest after a request to /speak."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": b"first", "more_body": True})
    waiting.append(asyncio.Event())
    await waiting[-1].wait()
    await send({"type": "http.response.body", "body": b"last"})


async def echo(receive: Any, send: Any) -> None:
    """Send every received message back."""
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
    """Serve `app` with this protocol; yield the port."""
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


def is_answered(connection: socket.socket) -> bool:
    """Send a request on this connection; return whether the answer has status 200."""
    connection.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    answer = b""
    while not answer.endswith(b"\r\n\r\n0"):
        answer += connection.recv(65_536)
    return answer.startswith(b"HTTP/1.1 200")


def is_cut_off(connection: socket.socket) -> bool:
    """Wait until the server closes or resets the connection; return True. Raises TimeoutError after 30 idle seconds."""
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
    "sent",
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
def test_a_client_that_stops_midway_is_cut_off(sent: bytes) -> None:
    with listening(with_limits(**QUICK)) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(sent)
        assert is_cut_off(connection)


@pytest.mark.parametrize("first", [b"", POST], ids=["header", "body"])
def test_single_bytes_do_not_extend_the_timeout(first: bytes) -> None:
    """Close the connection however often a byte arrives."""
    with listening(with_limits(**QUICK)) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(first)
        connection.settimeout(0.02)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                connection.sendall(b"G")
                with contextlib.suppress(TimeoutError):
                    if connection.recv(1) == b"":
                        raise ConnectionResetError


def test_a_fast_start_does_not_allow_a_long_silence() -> None:
    """Cut the client off after the gap limit, although its average rate would allow another minute."""
    protocol = with_limits(body_timeout=3600.0, gap_seconds=0.3)
    with listening(protocol) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(POST + b"x" * 999_999)
        assert is_cut_off(connection)


def test_a_pause_of_the_server_does_not_count_against_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server read nothing until another request tells it to continue."""
    protocol = with_limits(body_timeout=0.3, gap_seconds=0.3)
    with listening(protocol) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(30)
        checks = threading.Semaphore(0)
        on_timeout = protocol._on_timeout

        def counted(self: TimeoutProtocol) -> None:
            on_timeout(self)
            checks.release()

        monkeypatch.setattr(protocol, "_on_timeout", counted)
        connection.sendall(POST.replace(b"POST /", b"POST /later") + b"x" * 1_000_000)
        for _ in range(3):
            assert checks.acquire(timeout=30)
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.sendall(b"GET /speak HTTP/1.1\r\nHost: here\r\n\r\n")
            answer = b""
            while not answer.endswith(b"1000000"):
                answer += (part := connection.recv(1000))
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
def test_an_endless_header_is_refused(start: bytes, more: bytes) -> None:
    """Limit the size of headers, however much time is left. The same limit holds for trailers and chunk extensions."""
    patient = with_limits(header_timeout=3600.0, body_timeout=3600.0)
    with listening(patient) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(30)
        connection.sendall(start)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(100):
                connection.sendall(more * (65_536 // len(more)))


def test_a_body_in_the_smallest_chunks_is_accepted() -> None:
    """Send chunks of one byte, whose framing is six times as large as the data, and a short trailer."""
    with listening(TimeoutProtocol) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(60)
        connection.sendall(CHUNKED + b"1\r\na\r\n" * 199_999 + b"0\r\nX-A: b\r\n\r\n")
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    assert answer.endswith(b"\r\n\r\n200000")


def test_a_long_header_and_a_large_body_are_accepted_together() -> None:
    with listening(TimeoutProtocol) as port, httpx.Client(timeout=60, trust_env=False) as client:
        for _ in range(2):
            headers = {"x-long": "a" * 40_000}
            answer = client.post(f"http://127.0.0.1:{port}/", content=b"x" * 5_000_000, headers=headers)
            assert answer.text == "5000000"


def test_an_unread_answer_is_cut_off(tmp_path: Any) -> None:
    with listening(with_limits(**QUICK)) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n")
        # The test reads nothing until the server gives up and resets or closes the connection.
        is_closed = threading.Event()

        def watch() -> None:
            while not is_closed.is_set():
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
                # 1 is ESTABLISHED.
                if info[0] != 1:
                    is_closed.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert is_closed.wait(30)
        watcher.join()


def test_a_slow_but_steady_body_is_accepted() -> None:
    """Send for ten times the body timeout, at twice the required rate."""
    protocol = with_limits(header_timeout=5.0, body_timeout=0.2, body_rate=50_000)
    with listening(protocol) as port, httpx.Client(timeout=60, trust_env=False) as client:
        wait = threading.Event()

        def dripped() -> Iterator[bytes]:
            for _ in range(40):
                wait.wait(0.05)
                yield b"x" * 5_000

        answer = client.post(f"http://127.0.0.1:{port}/", content=dripped())
    assert answer.text == "200000"


#: Seconds, longer than every limit in QUICK.
LONG = 1.0


def assert_stays_open(connection: socket.socket) -> None:
    """Check that nothing arrives for LONG seconds, not even the end of the connection."""
    connection.settimeout(LONG)
    with pytest.raises(TimeoutError):
        connection.recv(65_536)
    connection.settimeout(30)


def test_pauses_between_requests_are_allowed() -> None:
    """Leave idle connections to the usual keep-alive timeout; each request has the full time limits."""
    with listening(with_limits(**QUICK)) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(2):
            assert is_answered(connection)
            assert_stays_open(connection)
        assert is_answered(connection)


def test_a_stream_may_pause() -> None:
    with listening(with_limits(**QUICK)) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(30)
        connection.sendall(b"POST /quiet HTTP/1.1\r\nHost: here\r\nContent-Length: 1\r\n\r\nx")
        answer = b""
        while b"first" not in answer:
            answer += connection.recv(65_536)
        assert_stays_open(connection)
        httpx.get(f"http://127.0.0.1:{port}/speak", trust_env=False)
        while part := connection.recv(65_536):
            answer += part
    assert b"last" in answer


def test_a_websocket_may_pause() -> None:
    with (
        listening(with_limits(**QUICK)) as port,
        connect(f"ws://127.0.0.1:{port}/", proxy=None, open_timeout=60) as connection,
    ):
        with pytest.raises(TimeoutError):
            connection.recv(timeout=LONG)
        connection.send("a word")
        assert connection.recv(timeout=60) == "a word"


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_tls_handshake_that_does_not_begin(tmp_path: Path, loop_factory: Any) -> None:
    """Cut the connection off; a port without TLS opens as before."""
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
            received = await reader.read()
        for each in (plain, server, writer):
            each.close()
        return received

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(wait()) == b""


def test_one_connection_too_many() -> None:
    with listening(with_limits(max_connections=2)) as port:
        address = ("127.0.0.1", port)
        with socket.create_connection(address) as first, socket.create_connection(address) as second:
            assert is_answered(first) and is_answered(second)
            with socket.create_connection(address) as third:
                assert is_cut_off(third)
            assert is_answered(first)


def test_more_connections_than_the_soft_limit_of_files(tmp_path: Path) -> None:
    """Raise the limit of open files: most systems start a program with 1024 and allow more."""
    with contextlib.ExitStack() as stack:
        with limited_open_files(64):
            server = stack.enter_context(serving(tmp_path, TEST_MODELS))
        host, port = server.ready().url.removeprefix("http://").split(":")
        held = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(100)]
        for connection in held:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")


def test_the_hard_limit_of_files_reduces_connections(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Hold fewer connections and log the number if the system does not allow more open files."""
    limits_set = list[Any]()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: limits_set.append(limits))
    assert raise_open_file_limit(4096, 2) == 128
    assert limits_set == [(1024, 1024)]
    assert "each port accepts 128 connections" in caplog.text
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    assert raise_open_file_limit(4096, 2) == 4096
    assert limits_set[1:] == [(16_896, resource.RLIM_INFINITY)]


def test_the_server_applies_the_connection_limit(tmp_path: Any) -> None:
    """Accept as many connections as the setting allows, and no more."""
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
