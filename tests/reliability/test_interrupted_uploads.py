"""Tests of kills and full disks during uploads and backups, and of damaged rows and pages."""

import random
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.auth import ANONYMOUS
from server.cli.control_socket import _call_server
from server.errors import DiskFull
from tests.support.components import Components, open_components, submission
from tests.support.faults.points import IN_BACKUP, IN_UPLOAD
from tests.support.server_process import ROOT, TEST_MODELS, Server, serving, wait_until_completed
from tests.support.small_disk import small_disk
from tests.unit.cli.test_control import flux_server
from tests.unit.storage.test_uploads import uploads_of
from tests.unit.webhooks.test_delivery import webhooks

FAULTS = {"models_dir": str(ROOT / "tests" / "support" / "faults" / "models")}
PARTS = {1: random.Random(1).randbytes(300_000), 2: random.Random(2).randbytes(200_000)}
WHOLE = PARTS[1] + PARTS[2]


def soak_all_but(points: Iterable[str], *first: str) -> list[Any]:
    """Return the points `first`, at which most can go wrong, and the other points, marked as soak tests."""
    return [*first, *(pytest.param(name, marks=pytest.mark.soak) for name in points if name not in first)]


@contextmanager
def started(data_dir: Path, *weights: str, **settings: Any) -> Iterator[tuple[Server, httpx.Client]]:
    with (
        serving(data_dir, *(weights or (TEST_MODELS,)), **settings) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        yield server, client


def initiate(client: httpx.Client) -> tuple[str, str]:
    """Initiate a multipart upload and return the paths of the upload and its file."""
    urls = client.post("/storage/upload/initiate-multipart", json={"file_name": "a.bin"}).raise_for_status().json()
    return httpx.URL(urls["upload_url"]).path, httpx.URL(urls["file_url"]).path


def send_parts(client: httpx.Client, upload: str, acknowledged: list[int]) -> None:
    """Send all missing parts, note each one that is acknowledged, then complete the upload."""
    for number, content in PARTS.items():
        if number not in acknowledged:
            client.put(f"{upload}/{number}", content=content).raise_for_status()
            acknowledged.append(number)
    client.post(f"{upload}/complete", json={}).raise_for_status()


def check_consistency(components: Components) -> None:
    """Check that files and rows match, and that the counts per owner are right."""
    assert components.rows("PRAGMA integrity_check") == [("ok",)]
    assert [(name,) for name in components.stored_file_names()] == components.rows(
        "SELECT name FROM files ORDER BY name"
    )
    assert components.rows(
        "SELECT owner, num_uploads, upload_bytes FROM kept WHERE num_uploads > 0"
    ) == components.rows(
        "SELECT owner, count(*), sum(max(size, 4096)) FROM files WHERE request_id IS NULL GROUP BY owner"
    )


@pytest.mark.parametrize("name", soak_all_but(IN_UPLOAD, "before a part is kept", "before that is committed"))
def test_a_kill_during_an_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Check that acknowledged parts survive, that no partial file is served, and that no unlisted file remains."""
    monkeypatch.setenv("CRASH_AT", name)
    monkeypatch.setenv("CRASH_MARKER", str(tmp_path / "marker"))
    data, acknowledged = tmp_path / "data", list[int]()
    with started(data, "test/crash=demo", **FAULTS) as (server, client):
        upload, file = initiate(client)
        with pytest.raises(httpx.TransportError):
            send_parts(client, upload, acknowledged)
        assert server.process.wait(60) == -9
    with started(data, "test/crash=demo", **FAULTS) as (server, client):
        part_names = sorted(path.name for path in (data / "uploads").rglob("*") if path.is_file())
        answer = client.get(file)
        if answer.status_code == 404:
            assert set(map(str, acknowledged)) <= set(part_names) <= {"1", "2"}
            send_parts(client, upload, acknowledged)
            answer = client.get(file)
        assert answer.content == WHOLE
        assert client.post(f"{upload}/complete", json={}).status_code == 404
        assert server.stop() == 0
    with open_components(data) as components:
        check_consistency(components)
        assert list((data / "uploads").iterdir()) == []
        assert uploads_of(components)._pending.num_parts.total() == 0


@pytest.mark.parametrize("name", soak_all_but(IN_BACKUP, "after the database is copied"))
def test_a_kill_during_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Check that a partial backup does not have the final name, and that the server loses nothing."""
    monkeypatch.setenv("CRASH_AT", name)
    monkeypatch.setenv("CRASH_MARKER", str(tmp_path / "marker"))
    data, copy = tmp_path / "data", tmp_path / "copy"
    with started(data, "test/crash=demo", **FAULTS) as (server, client):
        file = httpx.URL(client.post("/files/upload", content=WHOLE).json()["access_url"]).path
        process = flux_server(data, "backup", str(copy))
        assert (process.returncode, process.stdout) == (1, "")
        assert "ended before it responded" in process.stderr
        assert server.process.wait(60) == -9
    assert not copy.exists()
    with started(data, "test/crash=demo", **FAULTS) as (server, client):
        refused = flux_server(data, "backup", str(copy))
        assert (refused.returncode, refused.stderr) == (1, f"{copy}.part already exists; choose another target\n")
        assert flux_server(data, "backup", str(tmp_path / "other")).returncode == 0
        assert client.get(file).content == WHOLE
        assert server.stop() == 0
    for data_dir in (data, tmp_path / "other"):
        with open_components(data_dir) as components:
            check_consistency(components)


def test_a_full_disk_during_an_upload_and_a_backup(tmp_path: Path) -> None:
    """Leave room for the parts, but neither for the joined file nor for the backup."""
    with small_disk(tmp_path / "disk", 4 * 2**20) as disk:
        data = disk.inner_path / "data"
        with started(data, within=disk.enter_command) as (server, client):
            upload, file = initiate(client)
            client.put(f"{upload}/1", content=PARTS[1]).raise_for_status()
            disk.fill(room=100_000)
            assert client.put(f"{upload}/2", content=PARTS[2]).status_code == 507
            disk.fill(room=300_000)
            client.put(f"{upload}/2", content=PARTS[2]).raise_for_status()
            refused = client.post(f"{upload}/complete", json={})
            assert (refused.status_code, refused.json()["detail"]) == (507, DiskFull.message)
            assert client.get(file).status_code == 404
            disk.free()
            client.post(f"{upload}/complete", json={}).raise_for_status()
            assert client.get(file).content == WHOLE
            disk.fill(room=300_000)
            with pytest.raises(ValueError, match="No space left on device"):
                _call_server(disk.outer_path / "data", "back_up", {"directory": str(disk.inner_path / "copy")})
            disk.free()
            _call_server(disk.outer_path / "data", "back_up", {"directory": str(disk.inner_path / "copy")})
            assert server.stop() == 0
        assert sorted(path.name for path in disk.outer_path.iterdir()) == ["copy", "data", "filler"]
        for name in ("data", "copy"):
            with open_components(disk.copy(name, tmp_path / name)) as components:
                check_consistency(components)
                assert len(components.stored_file_names()) == 1


# -- damaged rows

#: SQL values that the server never writes. The first word of a key is the column.
DAMAGE = {
    "input": "'nonsense'",
    "input that is a list": "'[]'",
    "input without end": "'" + "[" * 10_000 + "'",
    "input that is no text": "CAST(x'7b22ff227d' AS TEXT)",
    "inputs": "'nonsense'",
    "inputs that are a list": "'[]'",
    "inputs that name no file": "'{\"image_url\": 5}'",
    "logs": "'nonsense'",
    "logs that are no list": "'{\"a\": 1}'",
    "endpoint": "'test/gone'",
    "base_url": "''",
    "webhook_url": "'ht!tp://[nonsense'",
    "output_size": "-1",
}
OUTPUT_DAMAGE = {"output": "'nonsense'", "output that is a list": "'[]'", "output cut short": f"'{{{'x' * 20_000}'"}
SET_RUNNING = "UPDATE jobs SET state = 'IN_PROGRESS', attempt = 1, started_at = ? WHERE request_id = ?"
SET_COMPLETED = "UPDATE jobs SET state = 'COMPLETED', finished_at = ?, status = 200, output = '{}' WHERE request_id = ?"
INSERT_DELIVERIES = (
    "INSERT INTO deliveries SELECT request_id, coalesce(webhook_url, 'http://127.0.0.1:9/'), 0, 1, NULL, NULL FROM jobs"
)


def write_damaged_requests(data_dir: Path) -> dict[tuple[str, str], str]:
    """Write requests with every kind of damage in every state, and an intact one per state. Return their IDs."""
    now, ids = time.time(), dict[tuple[str, str], str]()
    with open_components(data_dir) as components:
        for state in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED"):
            for damage in ("whole", *DAMAGE, *(OUTPUT_DAMAGE if state == "COMPLETED" else ())):
                url = "http://127.0.0.1:9/" if damage in ("whole", "webhook_url") else None
                request = submission(owner=ANONYMOUS, webhook_url=url)
                ids[state, damage] = request_id = components.queue.submit(request).request_id
                if state != "IN_QUEUE":
                    components.rows(SET_RUNNING, now, request_id)
                if state == "COMPLETED":
                    components.rows(SET_COMPLETED, now, request_id)
                if value := {**DAMAGE, **OUTPUT_DAMAGE}.get(damage):
                    components.rows("PRAGMA ignore_check_constraints = ON")
                    components.rows(f"UPDATE jobs SET {damage.split()[0]} = {value} WHERE request_id = ?", request_id)
        components.rows(f"{INSERT_DELIVERIES} WHERE state = 'COMPLETED'")
    return ids


def test_damaged_rows_do_not_affect_other_requests(tmp_path: Path) -> None:
    """Check that the server starts, that each request fails alone or succeeds, and that all requests are readable."""
    ids = write_damaged_requests(tmp_path)
    harmless = {"whole", "logs", "logs that are no list", "base_url", "webhook_url", "output_size"}
    with started(tmp_path, outbound_allow="127.0.0.0/8") as (server, client):
        for (state, damage), request_id in ids.items():
            path = f"/queue/{'test/gone' if damage == 'endpoint' else 'test/null'}/requests/{request_id}"
            status, answer = wait_until_completed(client, f"{path}/status"), client.get(path)
            assert answer.headers["content-type"] == "application/json"
            if state == "COMPLETED":
                assert (status["status"], answer.status_code) == ("COMPLETED", 500 if damage in OUTPUT_DAMAGE else 200)
            elif damage in harmless:
                assert (status.get("error"), answer.status_code) == (None, 200), damage
            else:
                assert status["error"], damage
                assert answer.status_code == (404 if damage == "endpoint" else 500), damage
                assert answer.json()["detail"]
        history: dict[str, Any] = {"endpoint_id": "test/null", "expand": "payloads", "limit": 100}
        items = client.get("/v1/models/requests/by-endpoint", params=history).raise_for_status().json()["items"]
        assert len(items) == sum(damage != "endpoint" for _, damage in ids)
        for page in ("/status.json", "/metrics", "/health"):
            assert client.get(page).status_code == 200
        assert client.post("/test/null", json={"prompt": "x"}).status_code == 200
        # No background loop has failed, such as that of the webhooks.
        assert "a webhook could not be sent, or its attempt could not be recorded" not in server.output
        assert server.stop() == 0


def test_a_webhook_reports_a_damaged_output(tmp_path: Path) -> None:
    ids = write_damaged_requests(tmp_path)
    with open_components(tmp_path) as components:
        for damage in OUTPUT_DAMAGE:
            _, payload = webhooks(components)._payload(ids["COMPLETED", damage])
            assert (payload["status"], payload["payload"]) == ("OK", [] if "list" in damage else None)
            assert ("payload_error" in payload) == ("list" not in damage)


# -- damaged pages


def overwrite_pages(file: Path, first: int, last: int) -> None:
    """Overwrite the pages from first up to, not including, last with noise. Pages count from 0."""
    with file.open("r+b") as opened_file:
        opened_file.seek(4096 * first)
        opened_file.write(random.Random(0).randbytes(4096 * (last - first)))


def write_waiting_requests(data_dir: Path) -> int:
    """Write a data directory with 300 waiting requests. Return the number of its database pages."""
    with open_components(data_dir) as components:
        for _ in range(300):
            components.queue.submit(submission(fields={"prompt": "x" * 500}))
        return int(components.rows("PRAGMA page_count")[0][0])


def test_damaged_pages_prevent_the_start(tmp_path: Path) -> None:
    """Check that each start reports the damage and changes nothing."""
    num_pages, file = write_waiting_requests(tmp_path), tmp_path / "queue.sqlite3"
    overwrite_pages(file, 1, num_pages)
    content = file.read_bytes()
    for _ in range(2):
        process = flux_server(tmp_path, "serve", "--port", "0", "--tls-port", "0")
        assert (process.returncode, "Traceback" in process.stderr) == (1, False)
        assert "restore it from a backup" in process.stderr
    assert file.read_bytes() == content


def test_damaged_pages_end_a_running_server_with_an_error(tmp_path: Path) -> None:
    """Check that the error is logged once, whichever query finds it: that of /status.json or the deadline check."""
    num_pages = write_waiting_requests(tmp_path)
    with serving(tmp_path, TEST_MODELS, max_running="1") as server:
        url = server.ready().url
        overwrite_pages(tmp_path / "queue.sqlite3", 1, num_pages)
        with ThreadPoolExecutor(1) as client:
            pending = client.submit(httpx.get, f"{url}/status.json", trust_env=False)
            assert server.process.wait(60) == 1
            if not pending.exception():
                assert (pending.result().status_code, pending.result().json()["error_type"]) == (500, "internal_error")
    assert server.output.count("restore it from a backup") == 1
    assert "Traceback" not in server.output
