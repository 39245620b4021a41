"""The memory limit of bodies and answers in flight: how it is shared, and which requests are refused."""

import asyncio
import base64
import contextlib
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack
from functools import wraps
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
from starlette.requests import Request
from starlette.types import Message
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.sync.client import connect

from server.errors import TooManyRequests
from server.net.bytes_in_flight import SMALL, BytesInFlight
from server.net.timeouts import with_limits
from server.net.websocket import CountedWebSocket
from tests.clients.test_realtime import SMALL as SMALL_REQUEST
from tests.clients.test_realtime import generate, session
from tests.http.test_timeouts import listening
from tests.support.image_files import encode, noise_image
from tests.support.server_process import TEST_MODELS, Server, serving, wait_until_completed

#: In bytes: the total, the share that one owner may hold, and a small size that still counts.
TOTAL, HALF, LITTLE = 80 * SMALL, 40 * SMALL, 2 * SMALL
ALICE, BOB = {"authorization": "Key alice:secret"}, {"authorization": "Key bob:secret"}


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Turn an async test into a function that runs the test in a new event loop."""

    @wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


@in_a_loop
async def test_a_request_without_room_waits() -> None:
    in_flight = BytesInFlight(TOTAL, wait_seconds=60)
    async with AsyncExitStack() as first:
        for _ in range(2):
            await first.enter_async_context(in_flight.room("me", HALF // 2))
        second = asyncio.create_task(held_once(in_flight, "me", HALF // 2))
        await held_once(in_flight, "you", HALF // 2)
        assert not second.done()
    await second
    assert in_flight.free == TOTAL


@in_a_loop
async def test_a_request_that_waits_too_long_is_refused() -> None:
    in_flight = BytesInFlight(TOTAL, wait_seconds=0.01)
    async with in_flight.room("me", HALF // 2), in_flight.room("me", HALF // 2):
        with pytest.raises(TooManyRequests):
            await held_once(in_flight, "me", LITTLE)
        await held_once(in_flight, "me", SMALL)
    assert in_flight.free == TOTAL


@in_a_loop
async def test_a_body_larger_than_the_total_still_passes() -> None:
    in_flight = BytesInFlight(TOTAL, wait_seconds=0.01)
    async with in_flight.room("me", 10 * TOTAL):
        assert in_flight.free == TOTAL - TOTAL // 4


@in_a_loop
async def test_a_cancelled_wait_takes_no_room() -> None:
    in_flight = BytesInFlight(TOTAL, wait_seconds=60)
    async with in_flight.room("me", HALF // 2), in_flight.room("me", HALF // 2):
        waiting = asyncio.create_task(held_once(in_flight, "me", LITTLE))
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
    assert in_flight.free == TOTAL


async def held_once(in_flight: BytesInFlight, owner: str, num_bytes: int) -> None:
    async with in_flight.room(owner, num_bytes):
        return


# -- over HTTP: with bodies of at most 1 MiB, one key may have 2 MiB in flight


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"keys": "alice:secret,bob:secret", "max_body_mib": "1"}
    with serving(tmp_path_factory.mktemp("in-flight"), TEST_MODELS, **settings) as server:
        yield server.ready()


LARGE = b'{"prompt": "x", "more": "' + b"x" * 1_000_000 + b'"}'


def stalled(server: Server, key: str, path: str = "/queue/test/null") -> socket.socket:
    """Send a request, except for the last byte of its body; return the open connection."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {key}\r\nContent-Length: {len(LARGE)}\r\n\r\n"
    connection.sendall(head.encode() + LARGE[:-1])
    return connection


def submitted(server: Server, headers: dict[str, str], content: bytes = LARGE) -> httpx.Response:
    return httpx.post(f"{server.url}/queue/test/null", content=content, headers=headers, timeout=60, trust_env=False)


def test_stalled_bodies_block_only_their_own_key(running: Server) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(stalled(running, ALICE["authorization"])) for _ in range(4)]
        refused = submitted(running, ALICE)
        assert refused.status_code == 429, refused.text
        assert "more than the key's share of the server's 4 MiB (four times --max-body-mib)" in refused.json()["detail"]
        assert refused.headers["retry-after"]
        # A small body needs no room.
        assert submitted(running, ALICE, b'{"prompt": "x"}').status_code == 200
        assert submitted(running, BOB).status_code == 200
        held[0].sendall(LARGE[-1:])
        assert held[0].recv(100).startswith(b"HTTP/1.1 200")
        assert submitted(running, ALICE).status_code == 200
    assert submitted(running, ALICE).status_code == 200


def test_a_request_without_a_key_is_refused_before_its_body(running: Server) -> None:
    for path in ("/queue/test/null", "/storage/upload/initiate", "/tokens", "/v1/images/generations"):
        with stalled(running, "Key eve:secret", path) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 401"), path


def test_a_websocket_with_an_unfinished_message_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Close the connection, even if the client answers pings in between."""
    monkeypatch.setattr(CountedWebSocket, "gap_seconds", 0.3)
    first = Frame(Opcode.BINARY, bytes(1000), fin=False).serialize(mask=True)
    with (
        listening(with_limits(), ws=CountedWebSocket) as port,
        connect(f"ws://127.0.0.1:{port}", proxy=None) as connection,
    ):
        connection.socket.sendall(first)
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=60)
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1008


@in_a_loop
async def test_a_body_of_unknown_length_counts_its_size_once_read() -> None:
    in_flight, size = BytesInFlight(TOTAL), 3 * SMALL

    async def receive() -> Message:
        return {"type": "http.request", "body": b"x" * size, "more_body": False}

    request = Request({"type": "http", "method": "POST", "headers": [(b"transfer-encoding", b"chunked")]}, receive)
    async with in_flight.body(request, "me") as body:
        assert (len(body), in_flight.free) == (size, TOTAL - size)
    assert in_flight.free == TOTAL


def test_stalled_frames_block_only_their_own_key(running: Server) -> None:
    frame = Frame(Opcode.BINARY, msgpack.packb({"prompt": "x", "more": bytes(1_000_000)})).serialize(mask=True)
    with ExitStack() as stack:
        sockets = [stack.enter_context(session(running, **ALICE)) for _ in range(3)]
        for each in sockets[:2]:
            each.socket.sendall(frame[:-1])
        # Once this answer arrives, the server has received both frames.
        assert submitted(running, ALICE, b'{"prompt": "x"}').status_code == 200
        sockets[2].socket.sendall(frame[:-1])
        with pytest.raises(ConnectionClosed) as closed:
            sockets[2].recv(timeout=60)
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1013
        with session(running, **BOB) as other:
            assert generate(other, more="x" * 900_000)["prompt"] == "x"
        # Close without a closing handshake, for which each side would wait.
        for each in sockets[:2]:
            each.socket.shutdown(socket.SHUT_RDWR)
    with session(running, **ALICE) as again:
        assert generate(again, more="x" * 900_000)["prompt"] == "x"
        assert generate(again, **SMALL_REQUEST)["prompt"] == "x"


def test_unread_answers_block_only_their_own_key(tmp_path: Path) -> None:
    """Use answers that contain their images and are larger than the buffers of the system."""
    settings = {"keys": "alice:secret,bob:secret", "max_body_mib": "8"}
    with serving(tmp_path, TEST_MODELS, **settings) as server:
        server.ready()
        results = {key: large_result_url(server, headers) for key, headers in (("alice", ALICE), ("bob", BOB))}
        with ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(unread(server, results["alice"], ALICE["authorization"]))
            # A refusal shows that both answers are being sent.
            answers = (httpx.get(results["alice"], headers=ALICE, timeout=60, trust_env=False) for _ in range(50))
            assert any(answer.status_code == 429 for answer in answers)
            assert httpx.get(f"{results['alice']}/status", headers=ALICE, trust_env=False).status_code == 200
            assert httpx.get(results["bob"], headers=BOB, timeout=60, trust_env=False).status_code == 200
        assert httpx.get(results["alice"], headers=ALICE, timeout=60, trust_env=False).status_code == 200


def large_result_url(server: Server, headers: dict[str, str]) -> str:
    """Run a request with a large result; return the URL of the result."""
    image = base64.b64encode(encode(noise_image(1100, 1100))).decode()
    body = {"image_url": f"data:image/png;base64,{image}", "sync_mode": True, "output_format": "png", "num_images": 2}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60, trust_env=False) as client:
        submitted = client.post("/queue/test/copy", json={"prompt": "x", **body}).raise_for_status().json()
        wait_until_completed(client, submitted["status_url"])
        url: str = submitted["response_url"]
        return url


def unread(server: Server, url: str, key: str) -> socket.socket:
    """Request this URL; return the connection, from which nothing of the answer has been read."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    connection.connect((host, int(port)))
    path = url.removeprefix(server.url)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {key}\r\n\r\n".encode())
    return connection
