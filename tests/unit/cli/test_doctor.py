"""Tests of `doctor`: its checks of the disk, the weights, the memory and the device, and its self test."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from models.flux.flops import FLUX_DEV
from models.loading import cpu, memory_plans
from server.cli import doctor, doctor_plans
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


def test_what_ip_adapters_need_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other requests do without it, so the check passes."""
    found = checks(tmp_path)["demo IP adapters"]
    assert found.ok
    assert found.message.startswith("do not work without openai/clip-vit-large-patch14 in the directory ")
    assert found.message.endswith("demo/clip-vision")
    assert "fal-ai/flux/dev IP adapters" not in checks(tmp_path, "fal-ai/flux/dev=demo")
    cached = {"openai/clip-vit-large-patch14": tmp_path}
    for place, message in ((cached, "resident"), ({}, "; run `flux-server pull openai/clip-vit-large-patch14`")):
        monkeypatch.setattr("models.loading.hub.cached_path", lambda hub_id, *_, place=place: place.get(hub_id))
        assert checks(tmp_path, HUB_ID)[f"{HUB_ID} IP adapters"].message.endswith(message)


def test_endpoints_that_lack_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other endpoints are served, so the check passes."""
    monkeypatch.setattr("models.loading.hub.cached_path", lambda *_: None)
    found = checks(tmp_path, HUB_ID)
    assert found[f"{HUB_ID} redux"] == Check(
        f"{HUB_ID} redux",
        True,
        "fal-ai/flux-1/dev/redux, fal-ai/flux/dev/redux: not served without black-forest-labs/FLUX.1-Redux-dev;"
        " run `flux-server pull black-forest-labs/FLUX.1-Redux-dev`",
    )
    assert "fal-ai/flux-control-lora-canny" in found[f"{HUB_ID} canny-lora"].message
    assert found[f"{HUB_ID} control nets"].message == "work with the memory plan resident"
    assert not [name for name in checks(tmp_path) if name.endswith((" redux", "-lora"))]


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


def plan_lines(
    monkeypatch: pytest.MonkeyPatch, free: int, *, has_torchao: bool, quantization: str = ""
) -> tuple[dict[str, str], str]:
    """Return the line of each plan on a GPU of known speed with so many bytes free, and the advice."""
    reason = None if has_torchao else "torchao is not installed"
    monkeypatch.setattr("models.loading.quantization.unavailable_reason", lambda: reason)
    monkeypatch.setattr("models.loading.fp8.unavailable_reason", lambda: reason)
    monkeypatch.setattr(doctor_plans, "_measured_rates", lambda: (74.39e12, 23.8e9 / 3))
    target, sizes = memory_plans.Target("cuda", quantization=quantization), doctor._FLUX_DEV_SIZES
    lines = {plan.name: line for plan, line in doctor_plans.describe_plans(sizes, FLUX_DEV, target, free)}
    settings = Settings(data_dir=Path("unused"))
    return lines, doctor_plans.advice(sizes, settings, target, free)


def test_each_plan_has_a_line_with_memory_time_and_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, advice = plan_lines(monkeypatch, 24_000_000_000, has_torchao=True)
    assert list(lines) == [plan.name for plan in memory_plans.PLANS]
    assert lines["resident"].startswith(
        "36.8 GB of GPU memory, does not fit; a step at 1024x1024 takes at least 1.00 s"
    )
    assert "GPU memory, fits; a step at 1024x1024 takes at least 1.00 s; PSNR 53 dB" in lines["int8"]
    assert "takes at least 0.50 s, if fp8 is twice as fast as bf16" in lines["fp8"]
    assert lines["group-offload"].endswith("fits; a step at 1024x1024 takes at least 3.00 s; the exact weights")
    assert advice == "keep int8 for the best images, or take --quantize fp8 for the fastest"


def test_weights_that_are_quantized_in_their_file_are_not_called_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, _ = plan_lines(monkeypatch, 40_000_000_000, has_torchao=True, quantization="GGUF Q4_0")
    assert lines["resident"].endswith("the weights as their files have them, GGUF Q4_0")
    assert "exact" not in "".join(lines.values())


@pytest.mark.parametrize(
    ("free", "has_torchao", "expected"),
    [
        (40e9, True, "keep resident"),
        (16e9, True, "keep int8"),
        (12e9, True, "keep int4"),
        (16e9, False, "int8 would change images less than group-offload, but torchao is not installed"),
        (8e9, True, "with 3.7 GB more memory, int4 would not copy the weights in every step"),
        (2e9, True, "free memory, because group-offload needs 4.9 GB"),
    ],
)
def test_the_advice_fits_the_card(
    monkeypatch: pytest.MonkeyPatch, free: float, has_torchao: bool, expected: str
) -> None:
    assert plan_lines(monkeypatch, int(free), has_torchao=has_torchao)[1] == expected


def test_without_a_gpu_no_time_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.loading.hub.cached_path", lambda *_: None)
    monkeypatch.setattr("models.flux.device.Device.matmul_rate", lambda self, dtype: 1e12)
    found = checks(tmp_path, HUB_ID)
    assert "seconds a step not yet measured, without a GPU" in found[f"{HUB_ID} with int4"].message
    assert found[f"{HUB_ID} advice"].message.startswith("use a GPU")


def test_the_self_test_covers_the_device_and_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        {"name": "matrix product", "state": "passed", "message": "fine"},
        {"name": "driver", "state": "skipped", "message": "on a CPU"},
        {"name": "C compiler", "state": "failed", "message": "install gcc"},
        {"name": "weights", "state": "skipped", "message": "no weights were named"},
    ]
    monkeypatch.setattr("models.flux.verdict.run_in_child", lambda *_: results)
    *lines, demo, fill = doctor.run_self_test(Settings(data_dir=tmp_path, weights=("demo",), device="cpu"))
    assert lines == [
        Check("matrix product", True, "fine"),
        Check("driver", True, "skipped, on a CPU"),
        Check("C compiler", False, "install gcc"),
    ]
    assert [check.name for check in (demo, fill)] == ["demo in the self test", "demo/fill.safetensors in the self test"]
    assert (demo.ok, fill.ok) == (True, True)
    assert demo.message.startswith("none differs from diffusers' pipeline by 0.00")
    assert fill.message.startswith("none generates")
