"""Kills and full disks in the middle of uploads and backups; rows and pages that are damaged."""

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
from tests.support.components import Parts, opened, submission
from tests.support.faults.points import IN_BACKUP, IN_UPLOAD
from tests.support.server_process import ROOT, TEST_MODELS, Server, completed, serving
from tests.support.small_disk import small_disk
from tests.unit.cli.test_control import flux_server
from tests.unit.storage.test_uploads import uploads_of
from tests.unit.webhooks.test_delivery import webhooks

FAULTS = {"models_dir": str(ROOT / "tests" / "support" / "faults" / "models")}
PARTS = {1: random.Random(1).randbytes(300_000), 2: random.Random(2).randbytes(200_000)}
WHOLE = PARTS[1] + PARTS[2]


def some(points: Iterable[str], *first: str) -> list[Any]:
    """Those at which most could go wrong, and the others in the soak alone."""
    return [*first, *(pytest.param(name, marks=pytest.mark.soak) for name in points if name not in first)]


@contextmanager
def started(folder: Path, *weights: str, **settings: Any) -> Iterator[tuple[Server, httpx.Client]]:
    with (
        serving(folder, *(weights or (TEST_MODELS,)), **settings) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        yield server, client


def begun(client: httpx.Client) -> tuple[str, str]:
    """The addresses of an upload in parts, and of its file."""
    said = client.post("/storage/upload/initiate-multipart", json={"file_name": "a.bin"}).raise_for_status().json()
    return httpx.URL(said["upload_url"]).path, httpx.URL(said["file_url"]).path


def sent(client: httpx.Client, upload: str, acknowledged: list[int]) -> None:
    """All parts, then their end; what was answered is noted."""
    for number, content in PARTS.items():
        if number not in acknowledged:
            client.put(f"{upload}/{number}", content=content).raise_for_status()
            acknowledged.append(number)
    client.post(f"{upload}/complete", json={}).raise_for_status()


def in_order(parts: Parts) -> None:
    """Each file has its row and each row its file; what is counted is what is there."""
    assert parts.rows("PRAGMA integrity_check") == [("ok",)]
    assert [(name,) for name in parts.on_disk()] == parts.rows("SELECT name FROM files ORDER BY name")
    assert parts.rows("SELECT owner, num_uploads, upload_bytes FROM kept WHERE num_uploads > 0") == parts.rows(
        "SELECT owner, count(*), sum(max(size, 4096)) FROM files WHERE request_id IS NULL GROUP BY owner"
    )


@pytest.mark.parametrize("name", some(IN_UPLOAD, "before a part is kept", "before that is committed"))
def test_a_kill_in_the_middle_of_an_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What was acknowledged is there, nothing half is served, nothing is left that no row lists."""
    monkeypatch.setenv("CRASH_AT", name)
    monkeypatch.setenv("CRASH_MARKER", str(tmp_path / "marker"))
    data, acknowledged = tmp_path / "data", list[int]()
    with started(data, "test/crash=demo", **FAULTS) as (server, client):
        upload, file = begun(client)
        with pytest.raises(httpx.TransportError):
            sent(client, upload, acknowledged)
        assert server.process.wait(60) == -9
    with started(data, "test/crash=demo", **FAULTS) as (server, client):
        left = sorted(path.name for path in (data / "uploads").rglob("*") if path.is_file())
        answer = client.get(file)
        if answer.status_code == 404:
            assert set(map(str, acknowledged)) <= set(left) <= {"1", "2"}
            sent(client, upload, acknowledged)
            answer = client.get(file)
        assert answer.content == WHOLE
        assert client.post(f"{upload}/complete", json={}).status_code == 404
        assert server.stop() == 0
    with opened(data) as parts:
        in_order(parts)
        assert list((data / "uploads").iterdir()) == []
        assert uploads_of(parts)._pending.num_parts.total() == 0


@pytest.mark.parametrize("name", some(IN_BACKUP, "after the database is copied"))
def test_a_kill_in_the_middle_of_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It has not the name of a whole one, and the server has lost nothing."""
    monkeypatch.setenv("CRASH_AT", name)
    monkeypatch.setenv("CRASH_MARKER", str(tmp_path / "marker"))
    data, copy = tmp_path / "data", tmp_path / "copy"
    with started(data, "test/crash=demo", **FAULTS) as (server, client):
        file = httpx.URL(client.post("/files/upload", content=WHOLE).json()["access_url"]).path
        done = flux_server(data, "backup", str(copy))
        assert (done.returncode, done.stdout) == (1, "")
        assert "ended before it responded" in done.stderr
        assert server.process.wait(60) == -9
    assert not copy.exists()
    with started(data, "test/crash=demo", **FAULTS) as (server, client):
        refused = flux_server(data, "backup", str(copy))
        assert (refused.returncode, refused.stderr) == (1, f"{copy}.part: File exists\n")
        assert flux_server(data, "backup", str(tmp_path / "other")).returncode == 0
        assert client.get(file).content == WHOLE
        assert server.stop() == 0
    for folder in (data, tmp_path / "other"):
        with opened(folder) as parts:
            in_order(parts)


def test_a_full_disk_in_the_middle_of_an_upload_and_of_a_backup(tmp_path: Path) -> None:
    """The parts fit, the whole beside them does not; nor does the copy."""
    with small_disk(tmp_path / "disk", 4 * 2**20) as disk:
        data = disk.folder / "data"
        with started(data, within=disk.within) as (server, client):
            upload, file = begun(client)
            client.put(f"{upload}/1", content=PARTS[1]).raise_for_status()
            disk.fill(room=100_000)
            assert client.put(f"{upload}/2", content=PARTS[2]).status_code == 507
            disk.fill(room=300_000)
            client.put(f"{upload}/2", content=PARTS[2]).raise_for_status()
            refused = client.post(f"{upload}/complete", json={})
            assert (refused.status_code, refused.json()["detail"]) == (507, "The disk of the server is full")
            assert client.get(file).status_code == 404
            disk.free()
            client.post(f"{upload}/complete", json={}).raise_for_status()
            assert client.get(file).content == WHOLE
            disk.fill(room=300_000)
            with pytest.raises(ValueError, match="No space left on device"):
                _call_server(disk.seen / "data", "back_up", {"folder": str(disk.folder / "copy")})
            disk.free()
            _call_server(disk.seen / "data", "back_up", {"folder": str(disk.folder / "copy")})
            assert server.stop() == 0
        assert sorted(path.name for path in disk.seen.iterdir()) == ["copy", "data", "filler"]
        for name in ("data", "copy"):
            with opened(disk.copy(name, tmp_path / name)) as parts:
                in_order(parts)
                assert len(parts.on_disk()) == 1


# -- damaged rows

#: What a column says that nobody wrote; SQL.
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
ANSWERS = {"output": "'nonsense'", "output that is a list": "'[]'", "output cut short": f"'{{{'x' * 20_000}'"}
RUNNING = "UPDATE jobs SET state = 'IN_PROGRESS', attempt = 1, started_at = ? WHERE request_id = ?"
ENDED = "UPDATE jobs SET state = 'COMPLETED', finished_at = ?, status = 200, output = '{}' WHERE request_id = ?"
DUE = (
    "INSERT INTO deliveries SELECT request_id, coalesce(webhook_url, 'http://127.0.0.1:9/'), 0, 1, NULL, NULL FROM jobs"
)


def damaged(folder: Path) -> dict[tuple[str, str], str]:
    """A folder with a damaged request of each kind in each state, and one that is whole; their ids."""
    now, ids = time.time(), dict[tuple[str, str], str]()
    with opened(folder) as parts:
        for state in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED"):
            for what in ("whole", *DAMAGE, *(ANSWERS if state == "COMPLETED" else ())):
                url = "http://127.0.0.1:9/" if what in ("whole", "webhook_url") else None
                given = submission(owner=ANONYMOUS, webhook_url=url)
                ids[state, what] = request_id = parts.queue.submit(given).request_id
                if state != "IN_QUEUE":
                    parts.rows(RUNNING, now, request_id)
                if state == "COMPLETED":
                    parts.rows(ENDED, now, request_id)
                if value := {**DAMAGE, **ANSWERS}.get(what):
                    parts.rows("PRAGMA ignore_check_constraints = ON")
                    parts.rows(f"UPDATE jobs SET {what.split()[0]} = {value} WHERE request_id = ?", request_id)
        parts.rows(f"{DUE} WHERE state = 'COMPLETED'")
    return ids


def test_damaged_rows_harm_nobody_else(tmp_path: Path) -> None:
    """The start succeeds; each ends with an error of its own or as it would have, and all can be read."""
    ids = damaged(tmp_path)
    fine = {"whole", "logs", "logs that are no list", "base_url", "webhook_url", "output_size"}
    with started(tmp_path, outbound_allow="127.0.0.0/8") as (server, client):
        for (state, what), request_id in ids.items():
            path = f"/queue/{'test/gone' if what == 'endpoint' else 'test/null'}/requests/{request_id}"
            status, answer = completed(client, f"{path}/status"), client.get(path)
            assert answer.headers["content-type"] == "application/json"
            if state == "COMPLETED":
                assert (status["status"], answer.status_code) == ("COMPLETED", 500 if what in ANSWERS else 200)
            elif what in fine:
                assert (status.get("error"), answer.status_code) == (None, 200), what
            else:
                assert status["error"], what
                assert answer.status_code == (404 if what == "endpoint" else 500), what
                assert answer.json()["detail"]
        history: dict[str, Any] = {"endpoint_id": "test/null", "expand": "payloads", "limit": 100}
        listed = client.get("/v1/models/requests/by-endpoint", params=history).raise_for_status().json()["items"]
        assert len(listed) == sum(what != "endpoint" for _, what in ids)
        for page in ("/status.json", "/metrics", "/health"):
            assert client.get(page).status_code == 200
        assert client.post("/test/null", json={"prompt": "x"}).status_code == 200
        # Nothing came to an end that it should not have, such as the loop of the webhooks.
        assert "a webhook's attempt could not be recorded" not in server.output
        assert server.stop() == 0


def test_a_webhook_tells_that_its_answer_is_damaged(tmp_path: Path) -> None:
    ids = damaged(tmp_path)
    with opened(tmp_path) as parts:
        for what in ANSWERS:
            _, told = webhooks(parts)._payload(ids["COMPLETED", what])
            assert (told["status"], told["payload"]) == ("OK", [] if "list" in what else None)
            assert ("payload_error" in told) == ("list" not in what)


# -- damaged pages


def noise(file: Path, first: int, last: int) -> None:
    """Overwrite these pages, counted from 0, in place."""
    with file.open("r+b") as opened_file:
        opened_file.seek(4096 * first)
        opened_file.write(random.Random(0).randbytes(4096 * (last - first)))


def with_requests(folder: Path) -> int:
    """Many that wait; returns the number of pages."""
    with opened(folder) as parts:
        for _ in range(300):
            parts.queue.submit(submission(fields={"prompt": "x" * 500}))
        return int(parts.rows("PRAGMA page_count")[0][0])


def test_a_page_of_noise_keeps_the_server_from_starting(tmp_path: Path) -> None:
    """It says so each time, and changes nothing."""
    num_pages, file = with_requests(tmp_path), tmp_path / "queue.sqlite3"
    noise(file, 1, num_pages)
    content = file.read_bytes()
    for _ in range(2):
        done = flux_server(tmp_path, "serve", "--port", "0", "--tls-port", "0")
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert "restore it from a backup" in done.stderr
    assert file.read_bytes() == content


def test_a_page_of_noise_ends_a_running_server_with_words(tmp_path: Path) -> None:
    """Whoever finds it, such as a look at deadlines four times a second, says it once."""
    num_pages = with_requests(tmp_path)
    with serving(tmp_path, TEST_MODELS, max_running="1") as server:
        url = server.ready().url
        noise(tmp_path / "queue.sqlite3", 1, num_pages)
        with ThreadPoolExecutor(1) as client:
            asked = client.submit(httpx.get, f"{url}/status.json", trust_env=False)
            assert server.process.wait(60) == 1
            if not asked.exception():
                assert (asked.result().status_code, asked.result().json()["error_type"]) == (500, "internal_error")
    assert server.output.count("restore it from a backup") == 1
    assert "Traceback" not in server.output
