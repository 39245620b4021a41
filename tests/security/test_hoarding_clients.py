"""Clients that hold shared resources: streams, sessions, connections, webhooks and unread answers."""

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
from tests.clients.test_realtime import SMALL, generate, receive, session
from tests.support.components import Components, finish_job, open_components
from tests.support.image_files import encode, noise_image
from tests.support.server_process import ROOT, TEST_MODELS, Gate, Server, serving, wait_until_completed
from tests.unit.webhooks.test_delivery import (
    cancel_deliveries,
    receiver_url,
    silent_receivers,
    submit_cancelled,
    webhooks,
)

SHORT_WRITE_TIMEOUT = str(ROOT / "tests" / "support" / "faults" / "short_write_timeout")
#: The state of an open connection in Linux's TCP_INFO.
ESTABLISHED = 1
ALICE, BOB = {"authorization": "Key alice"}, {"authorization": "Key bob"}


@contextmanager
def server_for_two(directory: Path, **settings: str) -> Iterator[tuple[Server, httpx.Client]]:
    """Start a server with keys of Alice and Bob; yield the server and a client."""
    with (
        serving(directory, TEST_MODELS, keys="alice,bob", outbound_allow="127.0.0.0/8", **settings) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        yield server, client


def address(server: Server) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)


def requested(server: Server, path: str, key: str = "alice", buffer: int = 0) -> socket.socket:
    """Send a request for this path; return its connection. `buffer` limits the unread bytes that the system holds."""
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(60)
    connection.connect(address(server))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Key {key}\r\n\r\n".encode())
    return connection


def status_of(connection: socket.socket) -> int:
    """Return the status of the answer, or 0 if the server closed the connection without an answer."""
    try:
        answer = connection.recv(65_536)
    except ConnectionResetError:
        return 0
    return int(answer.split(b" ", 2)[1]) if answer else 0


def read_to_the_end(connection: socket.socket) -> int:
    """Return the number of bytes until the server closes the connection. Raises TimeoutError if it stays open."""
    length = 0
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(2**20):
            length += len(part)
    return length


def wait_for_the_end(connection: socket.socket) -> None:
    """Wait, without reading, until the server closes the connection."""
    while connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED:
        threading.Event().wait(0.01)


def is_served(server: Server, key: dict[str, str]) -> bool:
    """Return whether a new client can submit a request and read its status."""
    with httpx.Client(base_url=server.url, headers=key, timeout=60, trust_env=False) as client:
        answer = client.post("/queue/test/null", json={"prompt": "x"})
        return answer.status_code == 200 and client.get(answer.json()["status_url"]).status_code in (200, 202)


@pytest.mark.parametrize("number", [500, pytest.param(1000, marks=pytest.mark.soak)])
def test_many_idle_event_streams_block_only_their_own_key(tmp_path: Path, gate: Gate, number: int) -> None:
    """The server must also close the connections that it refuses: this test opens more than --max-connections."""
    with server_for_two(tmp_path, max_connections="400") as (server, client), ExitStack() as stack:
        job = client.post("/queue/test/gate", json={"prompt": str(gate.path)}, headers=ALICE).json()
        path = httpx.URL(job["status_url"]).path
        seen = Counter[int]()
        for _ in range(number):
            connection = stack.enter_context(requested(server, f"{path}/stream"))
            seen[status_of(connection)] += 1
        assert is_served(server, BOB)
        assert seen == {200: 200, 429: number - 200}
        stack.close()
        # The old streams end one after another. Then as many open again, or the test times out.
        with ExitStack() as again:
            num_held = 0
            while num_held < 200:
                connection = requested(server, f"{path}/stream")
                if status_of(connection) == 200:
                    again.enter_context(connection)
                    num_held += 1
                else:
                    connection.close()
        gate.release_all()


def test_idle_realtime_sessions_block_only_their_own_key(tmp_path: Path) -> None:
    with server_for_two(tmp_path, max_connections="40") as (server, _), ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(session(server, **ALICE))
        for _ in range(40):
            with session(server, **ALICE) as refused:
                assert receive(refused)["error"] == "UNAVAILABLE"
        assert is_served(server, BOB)
        with session(server, **BOB) as bobs:
            assert generate(bobs)["seed"] == SMALL["seed"]


@pytest.mark.soak
def test_connections_without_a_request_are_cut_off(tmp_path: Path) -> None:
    """The server closes silent connections after 10 s and answered ones after 5 s; until then they block others."""
    with server_for_two(tmp_path, max_connections="40") as (server, client), ExitStack() as stack:
        client.close()
        held = [stack.enter_context(requested(server, "/health")) for _ in range(20)]
        assert [status_of(each) for each in held] == [200] * 20
        held += [stack.enter_context(socket.create_connection(address(server), timeout=60)) for _ in range(20)]
        with stack.enter_context(socket.create_connection(address(server), timeout=60)) as refused:
            assert status_of(refused) == 0
        for connection in held:
            read_to_the_end(connection)
        assert is_served(server, BOB)


# -- webhooks


def test_a_storm_of_redelivered_webhooks_delays_no_other_key(
    tmp_path: Path, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redeliver 2,000 webhooks to a receiver that hangs: another key's webhook arrives at once, with few reads."""
    monkeypatch.setattr("server.webhooks.delivery.TIMEOUT", 0.2)
    url, seen = receiver_url(httpserver), list[int]()
    with silent_receivers(1) as (silent,), open_components(tmp_path, max_length=3000) as components:
        storm = submit_cancelled(components, "alice", *(f"{silent}/{number}" for number in range(2000)))
        components.rows("UPDATE deliveries SET attempt = 11, due_at = NULL, error = 'answered 500'")
        monkeypatch.setattr("server.webhooks.delivery.time.time", components.clock)
        for request_id in storm:
            Control(components.database, components.data_dir).redeliver(request_id)
        reads = recorded_reads(components, monkeypatch)

        def attempts() -> int:
            return int(components.rows("SELECT sum(attempt) FROM deliveries WHERE url <> ?", url)[0][0])

        async def deliver(hooks: WebhookSender) -> None:
            components.notifier.bind_loop(asyncio.get_running_loop())
            with components.notifier.subscribe(WEBHOOKS) as changed:
                running = asyncio.create_task(hooks.run())
                for goal in (0, 5 * PER_RECEIVER):
                    while attempts() < goal:
                        await wait_for_change(changed, hooks, seen)
                    components.clock.now += 1
                    (other,), before = submit_cancelled(components, "bob", url), attempts()
                    components.notifier.notify(WEBHOOKS)
                    while not components.rows(
                        "SELECT 1 FROM deliveries WHERE delivered_at > 0 AND request_id = ?", other
                    ):
                        await wait_for_change(changed, hooks, seen)
                    assert attempts() - before <= 2 * PER_RECEIVER
                running.cancel()
                await cancel_deliveries()

        asyncio.run(deliver(webhooks(components)))
        assert max(seen) <= PER_RECEIVER + 1
        # The sender reads twice in each turn, and takes at most one turn for each attempt that ends.
        assert len(reads) <= 4 * (attempts() + 10)


def recorded_reads(components: Components, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each database read that looks for due deliveries is added."""
    reads, read = list[str](), components.database.read

    def recorded(sql: str, *values: object) -> list[sqlite3.Row]:
        if "passed" in sql:
            reads.append(sql)
        return read(sql, *values)

    monkeypatch.setattr(components.database, "read", recorded)
    return reads


def test_webhooks_continue_after_a_database_error(
    components: Components, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender must continue after any error; otherwise it would deliver nothing until the next start."""
    monkeypatch.setattr("server.webhooks.delivery._MAX_PAUSE", 0.01)
    url = receiver_url(httpserver)
    submit_cancelled(components, "alice", url)
    failed = list[str]()
    monkeypatch.setattr("server.webhooks.delivery.log.exception", lambda message, *args: failed.append(message))
    components.rows("ALTER TABLE deliveries RENAME TO hidden")

    async def deliver(hooks: WebhookSender) -> None:
        running = asyncio.create_task(hooks.run())
        while len(failed) < 2:
            assert not running.done()
            await asyncio.sleep(0.01)
        components.rows("ALTER TABLE hidden RENAME TO deliveries")
        while not components.rows("SELECT 1 FROM deliveries WHERE delivered_at > 0"):
            assert not running.done()
            await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(deliver(webhooks(components)))


async def wait_for_change(changed: asyncio.Event, hooks: WebhookSender, seen: list[int]) -> None:
    """Wait until a delivery succeeds or fails; record how many are in flight."""
    seen.append(len(hooks._in_flight))
    changed.clear()
    async with asyncio.timeout(20):
        await changed.wait()


# -- unread answers

COPIES = """
    WITH RECURSIVE numbers AS (SELECT 1 AS number UNION ALL SELECT number + 1 FROM numbers WHERE number < 1000)
    INSERT INTO jobs SELECT NULL, number, {columns} FROM jobs, numbers
"""


def write_history(directory: Path) -> None:
    """Write 1001 requests of Alice with prompts of 20,000 characters, all finished just now."""
    with open_components(directory) as components:
        (owner,) = {Keys(("alice",), pepper=pepper(components.database)).owner("Key alice")}
        job = finish_job(components, owner=owner, fields={"prompt": "x" * 20_000})
        components.rows("UPDATE jobs SET finished_at = unixepoch(), submitted_at = unixepoch()")
        columns = [name for (_, name, *_) in components.rows("PRAGMA table_info(jobs)")][2:]
        components.rows(COPIES.format(columns=", ".join(columns)))
        assert components.rows("SELECT count(*) FROM jobs") == [(1001,)], job


HISTORY = "/v1/models/requests/by-endpoint?endpoint_id=test/null&limit=100&expand=payloads"


def path_of(kind: str, client: httpx.Client, gate: Gate) -> str:
    """Prepare a large answer of this kind and return its path; the image within a result has 8 MB."""
    if kind == "file":
        return httpx.URL(client.post("/files/upload", content=bytes(20_000_000)).json()["access_url"]).path
    if kind == "result":
        image = base64.b64encode(encode(noise_image(1400, 1400))).decode()
        body = {"image_url": f"data:image/png;base64,{image}", "sync_mode": True, "output_format": "png"}
        job = client.post("/queue/test/copied", json={"prompt": "x", **body}).json()
        wait_until_completed(client, job["status_url"])
        return httpx.URL(job["response_url"]).path
    if kind == "events":
        job = client.post("/queue/test/hurry", json={"prompt": str(gate.path)}).json()
        return f"{httpx.URL(job['status_url']).path}/stream?logs=1"
    return {"history": HISTORY, "metrics": "/metrics"}[kind]


@pytest.mark.parametrize("kind", ["file", "result", "history", "metrics", "events"])
def test_unread_answers_do_not_fill_the_memory(tmp_path: Path, gate: Gate, kind: str) -> None:
    """The server cuts off clients that read nothing; until then, it holds little memory for them."""
    write_history(tmp_path)
    settings = {"keys": "alice,bob", "operator_keys": "boss", "models_dir": SHORT_WRITE_TIMEOUT, "max_body_mib": "8"}
    with (
        serving(tmp_path, "test/hurry=demo", "test/copied=demo", **settings) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False, headers=ALICE) as client,
        ExitStack() as stack,
    ):
        path, key = path_of(kind, client, gate), "boss" if kind == "metrics" else "alice"
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        unread = [stack.enter_context(requested(server, path, key, buffer=1)) for _ in range(200)]
        grown = list[int]()
        for _ in range(50):
            grown.append((process.memory_info().rss - before) >> 20)
            assert client.get("/health", headers=BOB).status_code == 200
        assert max(grown) < 150, grown
        if kind in ("file", "result", "history"):
            wait_for_the_end(unread[0])
        if kind == "events":
            assert status_of(unread[-1]) == 200
        gate.release_all()
