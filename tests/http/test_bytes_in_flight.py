"""The memory that bodies and answers on their way may take: shares of it, and who is turned away."""

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
from tests.clients.test_realtime import painted, session
from tests.http.test_timeouts import listening
from tests.support.hostile_images import encoded, noise
from tests.support.server_process import TEST_MODELS, Server, completed, serving

#: Bytes, all of them; what an owner alone may hold; and two more that are worth counting.
ALL, HALF, ONE = 80 * SMALL, 40 * SMALL, 2 * SMALL
ALICE, BOB = {"authorization": "Key alice:secret"}, {"authorization": "Key bob:secret"}


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in an event loop of its own."""

    @wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


@in_a_loop
async def test_who_finds_no_room_waits_for_it() -> None:
    in_flight = BytesInFlight(ALL, wait_seconds=60)
    async with AsyncExitStack() as first:
        for _ in range(2):
            await first.enter_async_context(in_flight.room("me", HALF // 2))
        second = asyncio.create_task(held_once(in_flight, "me", HALF // 2))
        await held_once(in_flight, "you", HALF // 2)
        assert not second.done()
    await second
    assert in_flight.free == ALL


@in_a_loop
async def test_who_waits_too_long_is_turned_away() -> None:
    in_flight = BytesInFlight(ALL, wait_seconds=0.01)
    async with in_flight.room("me", HALF // 2), in_flight.room("me", HALF // 2):
        with pytest.raises(TooManyRequests):
            await held_once(in_flight, "me", ONE)
        await held_once(in_flight, "me", SMALL)
    assert in_flight.free == ALL


@in_a_loop
async def test_what_is_larger_than_all_passes_still() -> None:
    in_flight = BytesInFlight(ALL, wait_seconds=0.01)
    async with in_flight.room("me", 10 * ALL):
        assert in_flight.free == ALL - ALL // 4


@in_a_loop
async def test_whoever_gives_up_waiting_takes_nothing() -> None:
    in_flight = BytesInFlight(ALL, wait_seconds=60)
    async with in_flight.room("me", HALF // 2), in_flight.room("me", HALF // 2):
        waiting = asyncio.create_task(held_once(in_flight, "me", ONE))
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
    assert in_flight.free == ALL


async def held_once(in_flight: BytesInFlight, owner: str, num_bytes: int) -> None:
    async with in_flight.room(owner, num_bytes):
        return


# -- over HTTP: with bodies of at most 1 MiB, one key has 2 MiB on its way


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"keys": "alice:secret,bob:secret", "max_body_mib": "1"}
    with serving(tmp_path_factory.mktemp("in-flight"), TEST_MODELS, **settings) as server:
        yield server.ready()


LARGE = b'{"prompt": "x", "more": "' + b"x" * 1_000_000 + b'"}'


def stopped(server: Server, key: str, path: str = "/queue/test/null") -> socket.socket:
    """A request whose body stops before its last byte."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {key}\r\nContent-Length: {len(LARGE)}\r\n\r\n"
    connection.sendall(head.encode() + LARGE[:-1])
    return connection


def submitted(server: Server, headers: dict[str, str], content: bytes = LARGE) -> httpx.Response:
    return httpx.post(f"{server.url}/queue/test/null", content=content, headers=headers, timeout=60, trust_env=False)


def test_bodies_that_stop_keep_out_their_own_key_alone(running: Server) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(stopped(running, ALICE["authorization"])) for _ in range(4)]
        refused = submitted(running, ALICE)
        assert refused.status_code == 429, refused.text
        assert "more than its share of 4 MiB (four times --max-body-mib)" in refused.json()["detail"]
        assert refused.headers["retry-after"]
        # What is small needs no room.
        assert submitted(running, ALICE, b'{"prompt": "x"}').status_code == 200
        assert submitted(running, BOB).status_code == 200
        held[0].sendall(LARGE[-1:])
        assert held[0].recv(100).startswith(b"HTTP/1.1 200")
        assert submitted(running, ALICE).status_code == 200
    assert submitted(running, ALICE).status_code == 200


def test_who_has_no_key_is_turned_away_before_the_body(running: Server) -> None:
    for path in ("/queue/test/null", "/storage/upload/initiate", "/tokens", "/v1/images/generations"):
        with stopped(running, "Key eve:secret", path) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 401"), path


def test_a_message_in_frames_that_do_not_go_on_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often pings are answered in between."""
    monkeypatch.setattr(CountedWebSocket, "gap_seconds", 0.3)
    first = Frame(Opcode.BINARY, bytes(1000), fin=False).serialize(mask=True)
    with listening(with_limits(), ws=CountedWebSocket) as port, connect(f"ws://127.0.0.1:{port}", proxy=None) as sent:
        sent.socket.sendall(first)
        with pytest.raises(ConnectionClosed) as closed:
            sent.recv(timeout=60)
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1008


@in_a_loop
async def test_a_body_of_no_known_length_counts_as_it_is_once_it_is_here() -> None:
    in_flight, size = BytesInFlight(ALL), 3 * SMALL

    async def receive() -> Message:
        return {"type": "http.request", "body": b"x" * size, "more_body": False}

    request = Request({"type": "http", "method": "POST", "headers": [(b"transfer-encoding", b"chunked")]}, receive)
    async with in_flight.body(request, "me") as body:
        assert (len(body), in_flight.free) == (size, ALL - size)
    assert in_flight.free == ALL


def test_frames_that_stop_keep_out_their_own_key_alone(running: Server) -> None:
    frame = Frame(Opcode.BINARY, msgpack.packb({"prompt": "x", "more": bytes(1_000_000)})).serialize(mask=True)
    with ExitStack() as stack:
        sockets = [stack.enter_context(session(running, **ALICE)) for _ in range(3)]
        for each in sockets[:2]:
            each.socket.sendall(frame[:-1])
        # Both are there before the third comes.
        assert submitted(running, ALICE, b'{"prompt": "x"}').status_code == 200
        sockets[2].socket.sendall(frame[:-1])
        with pytest.raises(ConnectionClosed) as closed:
            sockets[2].recv(timeout=60)
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1013
        with session(running, **BOB) as other:
            assert painted(other, more="x" * 900_000)["prompt"] == "x"
        # Without a goodbye, for which each side would wait.
        for each in sockets[:2]:
            each.socket.shutdown(socket.SHUT_RDWR)
    with session(running, **ALICE) as again:
        assert painted(again, more="x" * 900_000)["prompt"] == "x"
        assert painted(again, **SMALL_REQUEST)["prompt"] == "x"


def test_answers_that_nobody_reads_keep_out_their_own_key_alone(tmp_path: Path) -> None:
    """Each holds its pictures itself, more of them than the system's buffers hold."""
    settings = {"keys": "alice:secret,bob:secret", "max_body_mib": "8"}
    with serving(tmp_path, TEST_MODELS, **settings) as server:
        server.ready()
        results = {key: with_pictures(server, headers) for key, headers in (("alice", ALICE), ("bob", BOB))}
        with ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(unread(server, results["alice"], ALICE["authorization"]))
            # Until both are being sent.
            answers = (httpx.get(results["alice"], headers=ALICE, timeout=60, trust_env=False) for _ in range(50))
            assert any(answer.status_code == 429 for answer in answers)
            assert httpx.get(f"{results['alice']}/status", headers=ALICE, trust_env=False).status_code == 200
            assert httpx.get(results["bob"], headers=BOB, timeout=60, trust_env=False).status_code == 200
        assert httpx.get(results["alice"], headers=ALICE, timeout=60, trust_env=False).status_code == 200


def with_pictures(server: Server, headers: dict[str, str]) -> str:
    """Where the result is of a request whose answer is large."""
    picture = base64.b64encode(encoded(noise(1100, 1100))).decode()
    body = {"image_url": f"data:image/png;base64,{picture}", "sync_mode": True, "output_format": "png", "num_images": 2}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60, trust_env=False) as client:
        submitted = client.post("/queue/test/copy", json={"prompt": "x", **body}).raise_for_status().json()
        completed(client, submitted["status_url"])
        found: str = submitted["response_url"]
        return found


def unread(server: Server, url: str, key: str) -> socket.socket:
    """A request for this whose answer is never read."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    connection.connect((host, int(port)))
    path = url.removeprefix(server.url)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {key}\r\n\r\n".encode())
    return connection
