"""Data folders of every schema there ever was, with a request in each state: today's server goes on with them.

tests/schemas/ has the schemas that came before, each as it was when the next one came.
"""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic_core import from_json, to_json
from pytest_httpserver import HTTPServer

from server.storage.database import FILE
from server.storage.migrations import _STEPS, SCHEMA, VERSION
from tests.support.components import opened
from tests.support.hostile_images import encoded, noise
from tests.support.server_process import ROOT, TEST_MODELS, Server, completed, serving
from tests.unit.queue.test_retention import counted, kept
from tests.unit.webhooks.test_signatures import Receiver, is_fals

SCHEMAS = {int(path.stem[1:]): path for path in (ROOT / "tests" / "support" / "schemas").glob("v*.sql")}
EVERY = {**SCHEMAS, VERSION: SCHEMA}
PICTURE, UPLOADED = encoded(noise()), b"uploaded long ago"
PICTURE_NAME, UPLOADED_NAME = f"{'a' * 32}.png", f"{'b' * 32}.png"
#: 2026; nothing of it is old enough to be forgotten, for the test says how long things are kept.
LONG_AGO = 1_767_225_600.0
INPUT = {"prompt": "a tiger", "seed": 7, "num_inference_steps": 2}
ANSWER = {"images": [{"url": f"http://here/files/{PICTURE_NAME}"}], "seed": 7}
REFUSAL = {"detail": "This cannot be painted."}
BROUGHT = f"{'c' * 64}.png"
COMMON = {
    "endpoint": "test/null",
    "owner": "everybody",
    "mode": "queue",
    "priority": "normal",
    "input": to_json(INPUT).decode(),
    "base_url": "http://here",
    "body_hash": "0" * 64,
    "is_kept": 1,
    "is_private": 0,
    "submitted_at": LONG_AGO,
}
STARTED = {"attempt": 1, "started_at": LONG_AGO + 1}
ENDED = {**STARTED, "state": "COMPLETED", "finished_at": LONG_AGO + 2}
CANCELLED = {"detail": "Request cancelled by the client.", "error_type": "client_cancelled"}


def _ended(status: int, output: Any, **more: Any) -> dict[str, Any]:
    return {**ENDED, "status": status, "output": to_json(output).decode(), **more}


def jobs(hook: str) -> dict[str, dict[str, Any]]:
    """By request id."""
    return {
        "queued": {"state": "IN_QUEUE", "idempotency_key": "once"},
        "queued-low": {"state": "IN_QUEUE", "priority": "low", "webhook_url": hook},
        "given-back": {"state": "IN_QUEUE", **STARTED},
        "running": {"state": "IN_PROGRESS", **STARTED},
        "running-cancelled": {"state": "IN_PROGRESS", **STARTED, "is_cancelled": 1},
        # Not before the time when pictures could be brought along.
        "brought": {
            "state": "IN_QUEUE",
            "endpoint": "test/copy",
            "input": to_json({"prompt": "", "seed": 7, "image_url": BROUGHT}).decode(),
            "inputs": to_json({"image_url": BROUGHT}).decode(),
        },
        "run": {"state": "IN_PROGRESS", "mode": "run", **STARTED},
        "stream": {"state": "IN_QUEUE", "mode": "stream"},
        "succeeded": _ended(200, ANSWER, inference_time=1.5, acceleration="none", logs="[]"),
        "succeeded-due": _ended(200, ANSWER, webhook_url=hook),
        "succeeded-told": _ended(200, ANSWER, webhook_url=hook),
        "failed": _ended(500, REFUSAL, error="This cannot be painted.", error_type="internal_server_error"),
        "cancelled": _ended(499, CANCELLED, is_cancelled=1, error="Request cancelled", error_type="client_cancelled"),
    }


def insert(connection: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    """What there is no table or column for yet is left out, and so is a request that could not be without it."""
    known = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")}
    if not known or ("inputs" in row and "inputs" not in known):
        return
    told = {name: value for name, value in row.items() if name in known}
    marks = ", ".join(f":{name}" for name in told)
    connection.execute(f"INSERT INTO {table} ({', '.join(told)}) VALUES ({marks})", told)


def write(folder: Path, schema: Path, hook: str) -> None:
    """A data folder as a server of that schema left it when it was killed."""
    for name in ("files", "inputs"):
        (folder / name).mkdir(parents=True)
    (folder / "files" / PICTURE_NAME).write_bytes(PICTURE)
    (folder / "files" / UPLOADED_NAME).write_bytes(UPLOADED)
    (folder / "inputs" / BROUGHT).write_bytes(PICTURE)
    with closing(sqlite3.connect(folder / FILE, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(schema.read_text(encoding="utf-8"))
        for request_id, row in jobs(hook).items():
            insert(connection, "jobs", {**COMMON, "request_id": request_id, **row})
        file = {"owner": "everybody", "content_type": "image/png", "is_private": 0, "created_at": LONG_AGO}
        insert(connection, "files", {**file, "name": PICTURE_NAME, "request_id": "succeeded", "size": len(PICTURE)})
        insert(connection, "files", {**file, "name": UPLOADED_NAME, "size": len(UPLOADED), "file_name": "in.png"})
        due = {"request_id": "succeeded-due", "url": hook, "attempt": 3, "due_at": LONG_AGO, "error": "answered 500"}
        insert(connection, "deliveries", due)
        told = {"request_id": "succeeded-told", "url": hook, "attempt": 1, "delivered_at": LONG_AGO}
        insert(connection, "deliveries", told)
        used = {"owner": "everybody", "day": "2026-01-01", "endpoint": "test/null", "requests": 3, "billable_units": 6}
        insert(connection, "usage", used)
        insert(connection, "keys", {"hash": "f" * 64, "owner": "f" * 32, "created_at": LONG_AGO})
        insert(connection, "secrets", {"name": "pepper", "value": bytes(32)})
        insert(connection, "signing_keys", {"key_id": "1", "private": bytes(range(32)), "created_at": LONG_AGO})


@dataclass(frozen=True)
class Upgraded:
    """A folder that today's server was started on."""

    version: int
    folder: Path
    server: Server
    client: httpx.Client
    receiver: Receiver


def _in_turn(version: int) -> Any:
    """The oldest takes every step there is, and the last but one is what most come from; the others take their time."""
    marks = [] if version in (min(EVERY), VERSION - 1) else [pytest.mark.soak]
    return pytest.param(version, marks=marks, id=f"v{version}")


@pytest.fixture(params=map(_in_turn, sorted(EVERY)))
def upgraded(tmp_path: Path, request: pytest.FixtureRequest, httpserver: HTTPServer) -> Iterator[Upgraded]:
    receiver = Receiver(httpserver)
    write(tmp_path, EVERY[request.param], receiver.url)
    settings = {"outbound_allow": "localhost,127.0.0.0/8", "retention_days": "100000"}
    with (
        serving(tmp_path, TEST_MODELS, **settings) as server,
        httpx.Client(base_url=f"{server.url}/queue/test/null", timeout=60, trust_env=False) as client,
    ):
        yield Upgraded(request.param, tmp_path, server, client, receiver)


def test_there_is_a_folder_of_every_version() -> None:
    assert sorted(EVERY) == list(range(1, VERSION + 1))
    assert sorted(_STEPS) == list(range(2, VERSION + 1))


def test_nothing_is_lost_and_the_work_goes_on(upgraded: Upgraded) -> None:
    client = upgraded.client
    # What waited, and what ran, is painted.
    for name in ("queued", "queued-low", "given-back", "running"):
        assert completed(client, f"requests/{name}/status").get("error") is None
        answer = client.get(f"requests/{name}").raise_for_status().json()
        assert (answer["seed"], answer["prompt"]) == (7, "a tiger")
    if upgraded.version >= 3:
        url = f"{upgraded.server.url}/queue/test/copy/requests/brought"
        assert completed(client, f"{url}/status").get("error") is None
        assert client.get(url).raise_for_status().json()["images"][0]["width"] == noise().width
    # What had ended says what it said.
    for name in ("succeeded", "succeeded-due", "succeeded-told"):
        assert client.get(f"requests/{name}").raise_for_status().json() == ANSWER
    failed, cancelled = client.get("requests/failed"), client.get("requests/cancelled")
    assert (failed.status_code, failed.json()["detail"]) == (500, REFUSAL["detail"])
    assert (cancelled.status_code, cancelled.json()["error_type"]) == (499, "client_cancelled")
    for name in ("running-cancelled", "run", "stream"):
        assert completed(client, f"requests/{name}/status")["error"]
        assert client.get(f"requests/{name}").status_code == 499
    # The files are served, and the key that stood for a request still does.
    for name, content in ((PICTURE_NAME, PICTURE), (UPLOADED_NAME, UPLOADED)):
        assert client.get(f"{upgraded.server.url}/files/{name}").raise_for_status().content == content
    again = {"Idempotency-Key": "once"}
    assert client.post("", json=INPUT, headers=again).status_code == 422
    _hold_the_webhooks(upgraded)
    assert upgraded.server.stop() == 0
    assert "Traceback" not in upgraded.server.output
    _hold_the_rows(upgraded)


def _hold_the_webhooks(upgraded: Upgraded) -> None:
    """The one that was due, and the one of the request that was painted, signed with the key that was there."""
    jwks = httpx.get(f"{upgraded.server.url}/.well-known/jwks.json", trust_env=False).json()
    received = [upgraded.receiver.next() for _ in range(2)]
    assert {from_json(each.body)["request_id"] for each in received} == {"succeeded-due", "queued-low"}
    assert {from_json(each.body)["status"] for each in received} == {"OK"}
    assert all(is_fals(each, jwks) for each in received)
    # It is old by now: a new one stands beside it, which does not sign yet.
    assert [key["kid"] for key in jwks["keys"]][-1] == "1"


def _hold_the_rows(upgraded: Upgraded) -> None:
    with opened(upgraded.folder) as parts:
        assert parts.rows("PRAGMA integrity_check") == [("ok",)]
        assert parts.rows("PRAGMA foreign_key_check") == []
        states = dict(parts.rows("SELECT request_id, status FROM jobs WHERE state = 'COMPLETED'"))
        assert states.pop("brought", 200) == 200
        assert states == {
            **dict.fromkeys(("queued", "queued-low", "given-back", "running"), 200),
            **dict.fromkeys(("succeeded", "succeeded-due", "succeeded-told"), 200),
            **dict.fromkeys(("running-cancelled", "run", "stream", "cancelled"), 499),
            "failed": 500,
        }
        attempts = dict(parts.rows("SELECT request_id, attempt FROM jobs"))
        assert [attempts[name] for name in ("queued", "given-back", "running")] == [1, 2, 2]
        assert parts.rows("SELECT request_id, attempt, due_at, delivered_at IS NULL FROM deliveries ORDER BY 1") == [
            ("queued-low", 1, None, 0),
            ("succeeded-due", 4, None, 0),
            ("succeeded-told", 1, None, 0),
        ]
        used = parts.rows("SELECT requests, billable_units FROM usage WHERE day = '2026-01-01'")
        assert used == ([(3, 6)] if upgraded.version >= 4 else [])
        assert parts.rows("SELECT owner, name, scope FROM keys") == [("f" * 32, "", "operator")]
        assert parts.rows("SELECT value FROM secrets") == [(bytes(32),)]
        assert {PICTURE_NAME, UPLOADED_NAME} <= set(parts.on_disk())
        upgraded_to = shape(parts.database.read("SELECT * FROM sqlite_master"))
    with opened(upgraded.folder / "new") as parts:
        assert upgraded_to == shape(parts.database.read("SELECT * FROM sqlite_master"))
        assert parts.rows("PRAGMA user_version") == [(VERSION,)]


def shape(master: list[sqlite3.Row]) -> dict[str, list[str]]:
    """What makes up each table and index, every CHECK too, whatever the order and the comments."""
    return {row["name"]: sorted(_parts(re.sub(r"--.*", "", row["sql"] or ""))) for row in master}


def _parts(sql: str) -> Iterator[str]:
    """Cut at the outermost brackets, and at the commas between them."""
    depth, part = 0, ""
    for sign in sql:
        depth += {"(": 1, ")": -1}.get(sign, 0)
        if (sign == "," and depth == 1) or (sign == "(" and depth == 1) or (sign == ")" and depth == 0):
            yield " ".join(part.split())
            part = ""
        else:
            part += sign
    yield " ".join(part.split())


@pytest.mark.parametrize("version", sorted(SCHEMAS))
def test_what_each_owner_keeps_is_counted(tmp_path: Path, version: int) -> None:
    write(tmp_path, SCHEMAS[version], "http://here")
    with opened(tmp_path) as parts:
        assert kept(parts) == counted(parts)
        assert [owner for owner, *_ in kept(parts)] == ["everybody"]
