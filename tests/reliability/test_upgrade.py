"""Tests of upgrades from every earlier schema, with a request in each state: the current server continues the work.

tests/support/schemas/ has the earlier schemas, each in its last form before the next version.
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
from tests.support.components import open_components
from tests.support.image_files import encode, noise_image
from tests.support.server_process import ROOT, TEST_MODELS, Server, serving, wait_until_completed
from tests.unit.queue.test_retention import computed_totals, maintained_totals
from tests.unit.webhooks.test_signatures import Receiver, fal_signature_holds

SCHEMAS = {int(path.stem[1:]): path for path in (ROOT / "tests" / "support" / "schemas").glob("v*.sql")}
ALL_SCHEMAS = {**SCHEMAS, VERSION: SCHEMA}
IMAGE, UPLOAD = encode(noise_image()), b"uploaded long ago"
IMAGE_NAME, UPLOAD_NAME = f"{'a' * 32}.png", f"{'b' * 32}.png"
#: In 2026. Retention deletes nothing this old, since the test sets a long retention_days.
LONG_AGO = 1_767_225_600.0
INPUT = {"prompt": "a tiger", "seed": 7, "num_inference_steps": 2}
OUTPUT = {"images": [{"url": f"http://here/files/{IMAGE_NAME}"}], "seed": 7}
FAILURE = {"detail": "This cannot be painted."}
INPUT_FILE_NAME = f"{'c' * 64}.png"
COMMON_FIELDS = {
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
STARTED_FIELDS = {"attempt": 1, "started_at": LONG_AGO + 1}
COMPLETED_FIELDS = {**STARTED_FIELDS, "state": "COMPLETED", "finished_at": LONG_AGO + 2}
CANCELLATION = {"detail": "Request cancelled by the client.", "error_type": "client_cancelled"}


def _completed(status: int, output: Any, **fields: Any) -> dict[str, Any]:
    return {**COMPLETED_FIELDS, "status": status, "output": to_json(output).decode(), **fields}


def jobs(webhook_url: str) -> dict[str, dict[str, Any]]:
    """Return the job rows by request ID."""
    return {
        "queued": {"state": "IN_QUEUE", "idempotency_key": "once"},
        "queued-low": {"state": "IN_QUEUE", "priority": "low", "webhook_url": webhook_url},
        "given-back": {"state": "IN_QUEUE", **STARTED_FIELDS},
        "running": {"state": "IN_PROGRESS", **STARTED_FIELDS},
        "running-cancelled": {"state": "IN_PROGRESS", **STARTED_FIELDS, "is_cancelled": 1},
        # Only in schemas that support input images.
        "fetched": {
            "state": "IN_QUEUE",
            "endpoint": "test/copy",
            "input": to_json({"prompt": "", "seed": 7, "image_url": INPUT_FILE_NAME}).decode(),
            "inputs": to_json({"image_url": INPUT_FILE_NAME}).decode(),
        },
        "run": {"state": "IN_PROGRESS", "mode": "run", **STARTED_FIELDS},
        "stream": {"state": "IN_QUEUE", "mode": "stream"},
        "succeeded": _completed(200, OUTPUT, inference_time=1.5, acceleration="none", logs="[]"),
        "succeeded-due": _completed(200, OUTPUT, webhook_url=webhook_url),
        "succeeded-told": _completed(200, OUTPUT, webhook_url=webhook_url),
        "failed": _completed(500, FAILURE, error="This cannot be painted.", error_type="internal_server_error"),
        "cancelled": _completed(
            499, CANCELLATION, is_cancelled=1, error="Request cancelled", error_type="client_cancelled"
        ),
    }


def insert(connection: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    """Insert a row, without the columns that this schema lacks. Skip rows that need a missing table or input files."""
    columns = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")}
    if not columns or ("inputs" in row and "inputs" not in columns):
        return
    values = {name: value for name, value in row.items() if name in columns}
    marks = ", ".join(f":{name}" for name in values)
    connection.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", values)


def write_data_dir(data_dir: Path, schema: Path, webhook_url: str) -> None:
    """Write a data directory as a killed server of this schema leaves it."""
    for name in ("files", "inputs"):
        (data_dir / name).mkdir(parents=True)
    (data_dir / "files" / IMAGE_NAME).write_bytes(IMAGE)
    (data_dir / "files" / UPLOAD_NAME).write_bytes(UPLOAD)
    (data_dir / "inputs" / INPUT_FILE_NAME).write_bytes(IMAGE)
    with closing(sqlite3.connect(data_dir / FILE, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(schema.read_text(encoding="utf-8"))
        for request_id, row in jobs(webhook_url).items():
            insert(connection, "jobs", {**COMMON_FIELDS, "request_id": request_id, **row})
        file = {"owner": "everybody", "content_type": "image/png", "is_private": 0, "created_at": LONG_AGO}
        insert(connection, "files", {**file, "name": IMAGE_NAME, "request_id": "succeeded", "size": len(IMAGE)})
        insert(connection, "files", {**file, "name": UPLOAD_NAME, "size": len(UPLOAD), "file_name": "in.png"})
        due = {
            "request_id": "succeeded-due",
            "url": webhook_url,
            "attempt": 3,
            "due_at": LONG_AGO,
            "error": "answered 500",
        }
        insert(connection, "deliveries", due)
        delivered = {"request_id": "succeeded-told", "url": webhook_url, "attempt": 1, "delivered_at": LONG_AGO}
        insert(connection, "deliveries", delivered)
        usage = {"owner": "everybody", "day": "2026-01-01", "endpoint": "test/null", "requests": 3, "billable_units": 6}
        insert(connection, "usage", usage)
        insert(connection, "keys", {"hash": "f" * 64, "owner": "f" * 32, "created_at": LONG_AGO})
        insert(connection, "secrets", {"name": "pepper", "value": bytes(32)})
        insert(connection, "signing_keys", {"key_id": "1", "private": bytes(range(32)), "created_at": LONG_AGO})


@dataclass(frozen=True)
class Upgraded:
    """A data directory of an earlier version on which the current server runs."""

    version: int
    data_dir: Path
    server: Server
    client: httpx.Client
    receiver: Receiver


def _version_param(version: int) -> Any:
    """Return the test's parameter for a version, marked as a soak test unless it is the oldest or the previous version.

    The oldest version needs every migration, and most upgrades come from the previous version.
    """
    marks = [] if version in (min(ALL_SCHEMAS), VERSION - 1) else [pytest.mark.soak]
    return pytest.param(version, marks=marks, id=f"v{version}")


@pytest.fixture(params=map(_version_param, sorted(ALL_SCHEMAS)))
def upgraded(tmp_path: Path, request: pytest.FixtureRequest, httpserver: HTTPServer) -> Iterator[Upgraded]:
    receiver = Receiver(httpserver)
    write_data_dir(tmp_path, ALL_SCHEMAS[request.param], receiver.url)
    settings = {"outbound_allow": "localhost,127.0.0.0/8", "retention_days": "100000"}
    with (
        serving(tmp_path, TEST_MODELS, **settings) as server,
        httpx.Client(base_url=f"{server.url}/queue/test/null", timeout=60, trust_env=False) as client,
    ):
        yield Upgraded(request.param, tmp_path, server, client, receiver)


def test_every_version_has_a_schema_and_a_migration() -> None:
    assert sorted(ALL_SCHEMAS) == list(range(1, VERSION + 1))
    assert sorted(_STEPS) == list(range(2, VERSION + 1))


def test_no_request_is_lost_and_work_continues(upgraded: Upgraded) -> None:
    client = upgraded.client
    # Waiting and running requests complete.
    for name in ("queued", "queued-low", "given-back", "running"):
        assert wait_until_completed(client, f"requests/{name}/status").get("error") is None
        answer = client.get(f"requests/{name}").raise_for_status().json()
        assert (answer["seed"], answer["prompt"]) == (7, "a tiger")
    if upgraded.version >= 3:
        url = f"{upgraded.server.url}/queue/test/copy/requests/fetched"
        assert wait_until_completed(client, f"{url}/status").get("error") is None
        assert client.get(url).raise_for_status().json()["images"][0]["width"] == noise_image().width
    # Completed requests keep their results.
    for name in ("succeeded", "succeeded-due", "succeeded-told"):
        assert client.get(f"requests/{name}").raise_for_status().json() == OUTPUT
    failed, cancelled = client.get("requests/failed"), client.get("requests/cancelled")
    assert (failed.status_code, failed.json()["detail"]) == (500, FAILURE["detail"])
    assert (cancelled.status_code, cancelled.json()["error_type"]) == (499, "client_cancelled")
    for name in ("running-cancelled", "run", "stream"):
        assert wait_until_completed(client, f"requests/{name}/status")["error"]
        assert client.get(f"requests/{name}").status_code == 499
    # The files are served, and the idempotency key is still known.
    for name, content in ((IMAGE_NAME, IMAGE), (UPLOAD_NAME, UPLOAD)):
        assert client.get(f"{upgraded.server.url}/files/{name}").raise_for_status().content == content
    headers = {"Idempotency-Key": "once"}
    assert client.post("", json=INPUT, headers=headers).status_code == 422
    _check_webhooks(upgraded)
    assert upgraded.server.stop() == 0
    assert "Traceback" not in upgraded.server.output
    _check_rows(upgraded)


def _check_webhooks(upgraded: Upgraded) -> None:
    """Check that the due webhook and that of the newly completed request arrive, signed with the existing key."""
    jwks = httpx.get(f"{upgraded.server.url}/.well-known/jwks.json", trust_env=False).json()
    received = [upgraded.receiver.next() for _ in range(2)]
    assert {from_json(each.body)["request_id"] for each in received} == {"succeeded-due", "queued-low"}
    assert {from_json(each.body)["status"] for each in received} == {"OK"}
    assert all(fal_signature_holds(each, jwks) for each in received)
    # The existing key is old by now, so the server also publishes a new key: the first, which does not sign yet.
    assert [key["kid"] for key in jwks["keys"]][-1] == "1"


def _check_rows(upgraded: Upgraded) -> None:
    with open_components(upgraded.data_dir) as components:
        assert components.rows("PRAGMA integrity_check") == [("ok",)]
        assert components.rows("PRAGMA foreign_key_check") == []
        states = dict(components.rows("SELECT request_id, status FROM jobs WHERE state = 'COMPLETED'"))
        assert states.pop("fetched", 200) == 200
        assert states == {
            **dict.fromkeys(("queued", "queued-low", "given-back", "running"), 200),
            **dict.fromkeys(("succeeded", "succeeded-due", "succeeded-told"), 200),
            **dict.fromkeys(("running-cancelled", "run", "stream", "cancelled"), 499),
            "failed": 500,
        }
        attempts = dict(components.rows("SELECT request_id, attempt FROM jobs"))
        assert [attempts[name] for name in ("queued", "given-back", "running")] == [1, 2, 2]
        assert components.rows(
            "SELECT request_id, attempt, due_at, delivered_at IS NULL FROM deliveries ORDER BY 1"
        ) == [
            ("queued-low", 1, None, 0),
            ("succeeded-due", 4, None, 0),
            ("succeeded-told", 1, None, 0),
        ]
        made = components.rows("SELECT acceleration, dtype, weights, memory FROM jobs WHERE request_id = 'succeeded'")
        assert made == [("none", None, None, None)]
        usage = components.rows("SELECT requests, billable_units FROM usage WHERE day = '2026-01-01'")
        assert usage == ([(3, 6)] if upgraded.version >= 4 else [])
        assert components.rows("SELECT owner, name, scope FROM keys") == [("f" * 32, "", "operator")]
        assert components.rows("SELECT value FROM secrets") == [(bytes(32),)]
        assert {IMAGE_NAME, UPLOAD_NAME} <= set(components.stored_file_names())
        upgraded_schema = normalized_schema(components.database.read("SELECT * FROM sqlite_master"))
    with open_components(upgraded.data_dir / "new") as components:
        assert upgraded_schema == normalized_schema(components.database.read("SELECT * FROM sqlite_master"))
        assert components.rows("PRAGMA user_version") == [(VERSION,)]


def normalized_schema(master: list[sqlite3.Row]) -> dict[str, list[str]]:
    """Return the definitions in each table and index, including CHECKs, without comments and in sorted order."""
    return {row["name"]: sorted(_split_definitions(re.sub(r"--.*", "", row["sql"] or ""))) for row in master}


def _split_definitions(sql: str) -> Iterator[str]:
    """Split SQL at the outermost parentheses and at the commas between them."""
    depth, part = 0, ""
    for character in sql:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if (character == "," and depth == 1) or (character == "(" and depth == 1) or (character == ")" and depth == 0):
            yield " ".join(part.split())
            part = ""
        else:
            part += character
    yield " ".join(part.split())


@pytest.mark.parametrize("version", sorted(SCHEMAS))
def test_migrations_count_what_each_owner_keeps(tmp_path: Path, version: int) -> None:
    write_data_dir(tmp_path, SCHEMAS[version], "http://here")
    with open_components(tmp_path) as components:
        assert maintained_totals(components) == computed_totals(components)
        assert [owner for owner, *_ in maintained_totals(components)] == ["everybody"]
