"""Tests of a read-only data directory, and of a database that is replaced while the server runs."""

import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from server.errors import DiskFails
from tests.support.components import open_components
from tests.support.server_process import ROOT, TEST_MODELS, Gate, serving, wait_until_claimed, wait_until_completed
from tests.support.small_disk import SmallDisk, small_disk
from tests.unit.cli.test_control import flux_server

FAULTS = str(ROOT / "tests" / "support" / "faults" / "read_only")
READ_ONLY = str(DiskFails.because("attempt to write a readonly database"))


def remount(disk: SmallDisk, mode: str) -> None:
    """Remount the disk as "ro" or "rw". No file on the disk may be open for writing."""
    subprocess.run([*disk.enter_command, "mount", "-o", f"remount,{mode}", str(disk.inner_path)], check=True)


def test_a_read_only_data_directory_at_startup(tmp_path: Path) -> None:
    """Check that the error names the directory, and that nothing is lost once it is writable again."""
    with small_disk(tmp_path / "disk", 8 * 2**20) as disk:
        data = disk.inner_path / "data"
        with serving(data, TEST_MODELS, within=disk.enter_command) as server:
            answer = httpx.post(f"{server.ready().url}/test/null", json={"prompt": "x"}, trust_env=False).json()
            assert server.stop() == 0
        remount(disk, "ro")
        for _ in range(2):
            with serving(data, TEST_MODELS, within=disk.enter_command) as server:
                assert server.process.wait(60) == 1
            assert server.output.startswith("The server could not start:\n")
            assert "Read-only file system" in server.output and str(data) in server.output
            assert "Traceback" not in server.output
        remount(disk, "rw")
        with serving(data, TEST_MODELS, within=disk.enter_command) as server:
            image_path = httpx.URL(answer["images"][0]["url"]).path
            assert httpx.get(f"{server.ready().url}{image_path}", trust_env=False).status_code == 200


def test_a_data_directory_that_becomes_read_only(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that running requests wait, that new ones get a 507, and that all continue without a traceback."""
    seal = tmp_path / "seal"
    monkeypatch.setenv("SEAL", str(seal))
    with (
        serving(tmp_path / "data", "test/sealed=demo", models_dir=FAULTS, max_running="1") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        body = {"prompt": str(gate.path), "num_inference_steps": 1}
        running = client.post("/queue/test/sealed", json=body).json()
        late = client.post("/queue/test/sealed", json=body, headers={"x-fal-request-timeout": "1"}).json()
        wait_until_claimed(client, running["status_url"])
        seal.touch()
        gate.release_all()
        server.wait_for(r"cannot use its disk.* trying again every second \[server.worker.postprocessor\]")
        for path in ("/queue/test/sealed", "/test/sealed", "/test/sealed/stream", "/storage/upload/initiate"):
            refused = client.post(path, json=body)
            assert (refused.status_code, refused.json()["detail"]) == (507, READ_ONLY)
        assert client.post("/files/upload", content=b"x").status_code == 507
        assert client.get(running["status_url"]).json()["status"] == "IN_PROGRESS"
        for page in ("/health", "/status.json", "/metrics"):
            assert client.get(page).status_code == 200
        server.wait_for(r"cannot use its disk.*; trying again \[server.app\]")
        seal.unlink()
        assert wait_until_completed(client, running["status_url"]).get("error") is None
        assert wait_until_completed(client, late["status_url"])["status"] == "COMPLETED"
        assert client.post("/test/sealed", json=body).status_code == 200
        assert "Traceback" not in server.output
        assert server.output.count("cannot use its disk") < 30
        assert server.stop() == 0
    with open_components(tmp_path / "data") as components:
        assert components.rows("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("how", ["cp", "mv", "rm"])
def test_replacing_the_database_ends_a_running_server(tmp_path: Path, how: str) -> None:
    """Check that the error is logged, and that the next server serves the new database, not a mixture of both."""
    data, copy = tmp_path / "data", tmp_path / "copy" / "queue.sqlite3"
    with (
        serving(data, TEST_MODELS) as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        old = client.post("/queue/test/null", json={"prompt": "old"}).json()
        wait_until_completed(client, old["status_url"])
        assert flux_server(data, "backup", str(copy.parent)).returncode == 0
        new = client.post("/queue/test/null", json={"prompt": "new"}).json()
        wait_until_completed(client, new["status_url"])
        if how == "cp":
            shutil.copyfile(copy, data / copy.name)
        elif how == "mv":
            copy.rename(data / copy.name)
        else:
            (data / copy.name).unlink()
        # The first query that notices the change ends the server: at the latest the frequent check of deadlines.
        assert server.process.wait(60) == 1
    assert server.output.count("was replaced or written to by another program while the server ran") == 1
    assert "Traceback" not in server.output
    assert (data / "queue.sqlite3-wal.replaced").exists()
    with serving(data, TEST_MODELS) as server:
        if how == "rm":
            assert server.process.wait(60) == 1
            assert "its database is missing" in server.output
            return
        paths = [httpx.URL(job["response_url"]).path for job in (old, new)]
        answers = [httpx.get(f"{server.ready().url}{path}", trust_env=False).status_code for path in paths]
        assert answers == [200, 404]
        assert server.stop() == 0
    with open_components(data) as components:
        assert components.rows("PRAGMA integrity_check") == [("ok",)]
