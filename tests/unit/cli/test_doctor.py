"""What `doctor` says of a machine that cannot run what it is asked about."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from models.loading import cpu
from server.cli import doctor
from server.cli.doctor import Check
from server.settings import Settings

HUB_ID = "black-forest-labs/FLUX.1-dev"


def found(data_dir: Path, *weights: str, **changes: Any) -> dict[str, Check]:
    """Every finding by what was looked at, of which each is there once."""
    fixed: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", **changes}
    settings = Settings(data_dir=data_dir, weights=weights or ("demo",), **fixed)
    findings = list(doctor.run_checks(settings))
    by_name = {finding.name: finding for finding in findings}
    assert len(by_name) == len(findings)
    return by_name


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("file", "file is not a directory"),
        ("file/below/it", "file is not a directory"),
        ("foreign", "foreign has files/ but no queue.sqlite3"),
    ],
)
def test_a_folder_that_serve_refuses_is_not_well(tmp_path: Path, place: str, words: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "foreign" / "files" / "mine").mkdir(parents=True)
    disk = found(tmp_path / place, retention_gb=0.001)["disk"]
    assert not disk.ok
    assert words in disk.message


def test_a_folder_that_may_not_be_written_is_not_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(tmp_path / "new", retention_gb=0.001)["disk"].ok
    # To root, who may be running this, everything is permitted.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    disk = found(tmp_path / "new", retention_gb=0.001)["disk"]
    assert (disk.ok, disk.message) == (False, f"no permission to read and write {tmp_path}")


def test_weights_of_many_endpoints_are_looked_at_once(tmp_path: Path) -> None:
    weights = found(tmp_path)["demo"]
    assert weights.ok
    assert "fal-ai/flux/dev, " in weights.message


def test_where_nothing_fits_no_plan_is_named_as_if_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.loading.hub.cached_path", lambda hub_id: None)
    memory = psutil.virtual_memory()._replace(available=23_200_000_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    words = found(tmp_path, HUB_ID)[f"{HUB_ID} memory"].message
    assert words == "no plan fits; required: resident 37.79 GB; free: 23.2 GB"
    words = found(tmp_path, HUB_ID, memory="resident")[f"{HUB_ID} memory"].message
    assert words.startswith("resident does not fit; required: resident 37.79 GB, fp8-storage ")


def test_a_cpu_is_told_what_it_computes_in(tmp_path: Path) -> None:
    assert found(tmp_path, dtype="float32")["demo type"].message == "float32"
    assert cpu.describe() in found(tmp_path)["device"].message


def test_full_size_weights_on_a_cpu_are_told_with_what_a_step_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.loading.hub.cached_path", lambda hub_id: None)
    monkeypatch.setattr("models.flux.device.Device.matmul_rate", lambda self, dtype: 1e12)
    words = found(tmp_path, HUB_ID)[f"{HUB_ID} type"].message
    assert words.startswith("bfloat16; a step at 1024x768 takes 55 s or more here, an image of 28 steps 26 min")
    assert words.endswith("use a GPU")
