"""Clients that hold what others need: streams, sessions, connections, webhooks, answers that nobody reads."""

import asyncio
import base64
import contextlib
import socket
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from pytest_httpserver import HTTPServer

from server.auth import Keys, pepper
from server.cli.control import Control
from server.queue.notifier import WEBHOOKS
from server.webhooks.delivery import PER_RECEIVER, WebhookSender
from tests.clients.test_realtime import SMALL, heard, painted, session
from tests.support.components import Parts, finished, opened
from tests.support.hostile_images import encoded, noise
from tests.support.server_process import ROOT, TEST_MODELS, Gate, Server, completed, serving
from tests.unit.webhooks.test_delivery import abandoned, cancelled, hook, silent_receivers, webhooks

IMPATIENT = str(ROOT / "tests" / "support" / "faults" / "impatient")
#: By Linux.
ESTABLISHED = 1
ALICE, BOB = {"authorization": "Key alice"}, {"authorization": "Key bob"}


@contextmanager
def for_two(folder: Path, **settings: str) -> Iterator[tuple[Server, httpx.Client]]:
    """A server for Alice and Bob, and a client."""
    with (
        serving(folder, TEST_MODELS, keys="alice,bob", outbound_allow="127.0.0.0/8", **settings) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        yield server, client


def address(server: Server) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)


def asked(server: Server, path: str, key: str = "alice", buffer: int = 0) -> socket.socket:
    """A request for this on a connection of its own; the system holds no more of its answer than `buffer`, if given."""
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(60)
    connection.connect(address(server))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Key {key}\r\n\r\n".encode())
    return connection


def status_of(connection: socket.socket) -> int:
    """Of its answer; 0 where it was closed without one."""
    try:
        said = connection.recv(65_536)
    except ConnectionResetError:
        return 0
    return int(said.split(b" ", 2)[1]) if said else 0


def read_to_the_end(connection: socket.socket) -> int:
    """All that comes until the server closes it; returns the bytes. One that is never closed fails by its timeout."""
    length = 0
    with contextlib.suppress(ConnectionResetError):
        while said := connection.recv(2**20):
            length += len(said)
    return length


def wait_for_the_end(connection: socket.socket) -> None:
    """Until the other side has given up, while nothing is read here."""
    while connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED:
        threading.Event().wait(0.01)


def is_served(server: Server, key: dict[str, str]) -> bool:
    """Whether somebody who comes new gets a status and a submit."""
    with httpx.Client(base_url=server.url, headers=key, timeout=60, trust_env=False) as client:
        said = client.post("/queue/test/null", json={"prompt": "x"})
        return said.status_code == 200 and client.get(said.json()["status_url"]).status_code in (200, 202)


@pytest.mark.parametrize("number", [500, pytest.param(1000, marks=pytest.mark.soak)])
def test_many_idle_event_streams_keep_out_their_own_key_alone(tmp_path: Path, gate: Gate, number: int) -> None:
    """Whoever is refused does not hold a connection either, of which there are fewer."""
    with for_two(tmp_path, max_connections="400") as (server, client), ExitStack() as stack:
        job = client.post("/queue/test/gate", json={"prompt": str(gate.path)}, headers=ALICE).json()
        path = httpx.URL(job["status_url"]).path
        seen = Counter[int]()
        for _ in range(number):
            connection = stack.enter_context(asked(server, f"{path}/stream"))
            seen[status_of(connection)] += 1
        assert is_served(server, BOB)
        assert seen == {200: 200, 429: number - 200}
        stack.close()
        # The old ones end one after the other; as many are held again, or the test's time runs out.
        with ExitStack() as again:
            num_held = 0
            while num_held < 200:
                connection = asked(server, f"{path}/stream")
                if status_of(connection) == 200:
                    again.enter_context(connection)
                    num_held += 1
                else:
                    connection.close()
        gate.open()


def test_idle_realtime_sessions_keep_out_their_own_key_alone(tmp_path: Path) -> None:
    with for_two(tmp_path, max_connections="40") as (server, _), ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(session(server, **ALICE))
        for _ in range(40):
            with session(server, **ALICE) as refused:
                assert heard(refused)["error"] == "UNAVAILABLE"
        assert is_served(server, BOB)
        with session(server, **BOB) as theirs:
            assert painted(theirs)["seed"] == SMALL["seed"]


@pytest.mark.soak
def test_connections_without_a_request_are_cut_off(tmp_path: Path) -> None:
    """New ones after ten seconds, those that had their answer after five; until then they keep others out."""
    with for_two(tmp_path, max_connections="40") as (server, client), ExitStack() as stack:
        client.close()
        held = [stack.enter_context(asked(server, "/health")) for _ in range(20)]
        assert [status_of(each) for each in held] == [200] * 20
        held += [stack.enter_context(socket.create_connection(address(server), timeout=60)) for _ in range(20)]
        with stack.enter_context(socket.create_connection(address(server), timeout=60)) as refused:
            assert status_of(refused) == 0
        for connection in held:
            read_to_the_end(connection)
        assert is_served(server, BOB)


# -- webhooks


def test_a_storm_of_webhooks_that_are_sent_again_holds_up_no_other_key(
    tmp_path: Path, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thousand to a receiver that hangs: the next one of another key comes at once, and reads stay few."""
    monkeypatch.setattr("server.webhooks.delivery.TIMEOUT", 0.2)
    url, seen = hook(httpserver), list[int]()
    with silent_receivers(1) as (silent,), opened(tmp_path, max_length=3000) as parts:
        storm = cancelled(parts, "alice", *(f"{silent}/{number}" for number in range(2000)))
        parts.rows("UPDATE deliveries SET attempt = 11, due_at = NULL, error = 'answered 500'")
        monkeypatch.setattr("server.webhooks.delivery.time.time", parts.clock)
        for request_id in storm:
            Control(parts.database, parts.folder).redeliver(request_id)
        reads = counted(parts, monkeypatch)

        def attempts() -> int:
            return int(parts.rows("SELECT sum(attempt) FROM deliveries WHERE url <> ?", url)[0][0])

        async def deliver(hooks: WebhookSender) -> None:
            parts.notifier.bind_loop(asyncio.get_running_loop())
            with parts.notifier.subscribe(WEBHOOKS) as bell:
                running = asyncio.create_task(hooks.run())
                for goal in (0, 5 * PER_RECEIVER):
                    while attempts() < goal:
                        await rung(bell, hooks, seen)
                    parts.clock.now += 1
                    (other,), before = cancelled(parts, "bob", url), attempts()
                    parts.notifier.notify(WEBHOOKS)
                    while not parts.rows("SELECT 1 FROM deliveries WHERE delivered_at > 0 AND request_id = ?", other):
                        await rung(bell, hooks, seen)
                    assert attempts() - before <= 2 * PER_RECEIVER
                running.cancel()
                await abandoned()

        asyncio.run(deliver(webhooks(parts)))
        assert max(seen) <= PER_RECEIVER + 1
        # Two for each turn, of which there is one for each attempt that ended at most.
        assert len(reads) <= 4 * (attempts() + 10)


def counted(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reads of what is due, as they come."""
    reads, read = list[str](), parts.database.read

    def noted(sql: str, *values: object) -> list[sqlite3.Row]:
        if "passed" in sql:
            reads.append(sql)
        return read(sql, *values)

    monkeypatch.setattr(parts.database, "read", noted)
    return reads


def test_the_webhooks_go_on_after_an_error_of_the_database(
    parts: Parts, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was: otherwise nothing would be delivered until the next start."""
    monkeypatch.setattr("server.webhooks.delivery._MAX_PAUSE", 0.01)
    url = hook(httpserver)
    cancelled(parts, "alice", url)
    failed = list[str]()
    monkeypatch.setattr("server.webhooks.delivery.log.exception", lambda message, *args: failed.append(message))
    parts.rows("ALTER TABLE deliveries RENAME TO away")

    async def deliver(hooks: WebhookSender) -> None:
        running = asyncio.create_task(hooks.run())
        while len(failed) < 2:
            assert not running.done()
            await asyncio.sleep(0.01)
        parts.rows("ALTER TABLE away RENAME TO deliveries")
        while not parts.rows("SELECT 1 FROM deliveries WHERE delivered_at > 0"):
            assert not running.done()
            await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(deliver(webhooks(parts)))


async def rung(bell: asyncio.Event, hooks: WebhookSender, seen: list[int]) -> None:
    """Wait until something was delivered, or was not."""
    seen.append(len(hooks._in_flight))
    bell.clear()
    async with asyncio.timeout(20):
        await bell.wait()


# -- answers that nobody reads

COPIES = """
    WITH RECURSIVE numbers AS (SELECT 1 AS number UNION ALL SELECT number + 1 FROM numbers WHERE number < 1000)
    INSERT INTO jobs SELECT NULL, number, {columns} FROM jobs, numbers
"""


def with_history(folder: Path) -> None:
    """A thousand requests of Alice's with prompts of 20,000 characters, which come to their end at the next start."""
    with opened(folder) as parts:
        (owner,) = {Keys(("alice",), pepper=pepper(parts.database)).owner("Key alice")}
        job = finished(parts, owner=owner, fields={"prompt": "x" * 20_000})
        parts.rows("UPDATE jobs SET finished_at = unixepoch(), submitted_at = unixepoch()")
        columns = [name for (_, name, *_) in parts.rows("PRAGMA table_info(jobs)")][2:]
        parts.rows(COPIES.format(columns=", ".join(columns)))
        assert parts.rows("SELECT count(*) FROM jobs") == [(1001,)], job


HISTORY = "/v1/models/requests/by-endpoint?endpoint_id=test/null&limit=100&expand=payloads"


def path_of(kind: str, client: httpx.Client, gate: Gate) -> str:
    """Where there is so much to read; a picture within an answer has 8 MB."""
    if kind == "file":
        return httpx.URL(client.post("/files/upload", content=bytes(20_000_000)).json()["access_url"]).path
    if kind == "result":
        picture = base64.b64encode(encoded(noise(1400, 1400))).decode()
        body = {"image_url": f"data:image/png;base64,{picture}", "sync_mode": True, "output_format": "png"}
        job = client.post("/queue/test/copied", json={"prompt": "x", **body}).json()
        completed(client, job["status_url"])
        return httpx.URL(job["response_url"]).path
    if kind == "events":
        job = client.post("/queue/test/hurry", json={"prompt": str(gate.path)}).json()
        return f"{httpx.URL(job['status_url']).path}/stream?logs=1"
    return {"history": HISTORY, "metrics": "/metrics"}[kind]


@pytest.mark.parametrize("kind", ["file", "result", "history", "metrics", "events"])
def test_answers_that_nobody_reads_fill_no_memory(tmp_path: Path, gate: Gate, kind: str) -> None:
    """Whoever reads nothing is cut off, and what is held for them meanwhile is bounded."""
    with_history(tmp_path)
    settings = {"keys": "alice,bob", "operator_keys": "boss", "models_dir": IMPATIENT, "max_body_mib": "8"}
    with (
        serving(tmp_path, "test/hurry=demo", "test/copied=demo", **settings) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False, headers=ALICE) as client,
        ExitStack() as stack,
    ):
        path, key = path_of(kind, client, gate), "boss" if kind == "metrics" else "alice"
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        unread = [stack.enter_context(asked(server, path, key, buffer=1)) for _ in range(200)]
        grown = list[int]()
        for _ in range(50):
            grown.append((process.memory_info().rss - before) >> 20)
            assert client.get("/health", headers=BOB).status_code == 200
        assert max(grown) < 150, grown
        if kind in ("file", "result", "history"):
            wait_for_the_end(unread[0])
        if kind == "events":
            assert status_of(unread[-1]) == 200
        gate.open()
