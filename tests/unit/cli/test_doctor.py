"""Tests of `doctor`: its checks of the disk, the weights, the memory and the device, and its self test."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from models.loading import cpu
from server.cli import doctor
from server.cli.doctor import Check
from server.settings import Settings

HUB_ID = "black-forest-labs/FLUX.1-dev"


def checks(data_dir: Path, *weights: str, **changes: Any) -> dict[str, Check]:
    """Return the checks by name, and assert that each name occurs once."""
    options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", **changes}
    settings = Settings(data_dir=data_dir, weights=weights or ("demo",), **options)
    findings = list(doctor.run_checks(settings))
    by_name = {finding.name: finding for finding in findings}
    assert len(by_name) == len(findings)
    return by_name


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "file is not a directory"),
        ("file/below/it", "file is not a directory"),
        ("foreign", "foreign has files/ but no queue.sqlite3"),
    ],
)
def test_a_data_directory_that_serve_refuses_fails_the_disk_check(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "foreign" / "files" / "mine").mkdir(parents=True)
    disk = checks(tmp_path / place, retention_gb=0.001)["disk"]
    assert not disk.ok
    assert message in disk.message


def test_an_unwritable_data_directory_fails_the_disk_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks(tmp_path / "new", retention_gb=0.001)["disk"].ok
    # Root may run this test, and root may write everywhere, so os.access is replaced.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    disk = checks(tmp_path / "new", retention_gb=0.001)["disk"]
    assert (disk.ok, disk.message) == (False, f"no permission to read and write {tmp_path}")


def test_weights_of_many_endpoints_are_checked_once(tmp_path: Path) -> None:
    weights = checks(tmp_path)["demo"]
    assert weights.ok
    assert "fal-ai/flux/dev, " in weights.message


def test_no_plan_is_recommended_when_none_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.loading.hub.cached_path", lambda *_: None)
    memory = psutil.virtual_memory()._replace(available=23_200_000_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    message = checks(tmp_path, HUB_ID)[f"{HUB_ID} memory"].message
    assert message == "no plan fits; required: resident 36.78 GB; free: 23.2 GB"
    message = checks(tmp_path, HUB_ID, memory="resident")[f"{HUB_ID} memory"].message
    assert message.startswith("resident does not fit; required: resident 36.78 GB, fp8-storage ")


def test_the_dtype_on_a_cpu_is_shown(tmp_path: Path) -> None:
    assert checks(tmp_path, dtype="float32")["demo type"].message == "float32"
    assert cpu.describe() in checks(tmp_path)["device"].message


def test_full_size_weights_on_a_cpu_are_shown_with_the_time_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.loading.hub.cached_path", lambda *_: None)
    monkeypatch.setattr("models.flux.device.Device.matmul_rate", lambda self, dtype: 1e12)
    message = checks(tmp_path, HUB_ID)[f"{HUB_ID} type"].message
    assert message.startswith("bfloat16; a step at 1024x768 takes at least 55 s, and an image of 28 steps 26 min")
    assert message.endswith("use a GPU")


def test_the_self_test_covers_the_device_and_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        {"name": "matrix product", "state": "passed", "message": "fine"},
        {"name": "driver", "state": "skipped", "message": "on a CPU"},
        {"name": "C compiler", "state": "failed", "message": "install gcc"},
        {"name": "weights", "state": "skipped", "message": "no weights were named"},
    ]
    monkeypatch.setattr("models.flux.verdict.run_in_child", lambda *_: results)
    *lines, weights = doctor.run_self_test(Settings(data_dir=tmp_path, weights=("demo",), device="cpu"))
    assert lines == [
        Check("matrix product", True, "fine"),
        Check("driver", True, "skipped, on a CPU"),
        Check("C compiler", False, "install gcc"),
    ]
    assert (weights.name, weights.ok) == ("demo in the self test", True)
    assert weights.message.startswith("none differs from diffusers' pipeline by 0.00")
