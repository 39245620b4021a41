"""Tests of CPU detection: what the CPU is fast at, and which dtype is used."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from models.base import EngineConfig
from models.flux.device import Device
from models.flux.flops import FLUX_DEV, step_flops
from models.loading import cpu
from models.loading.devices import dtype_for
from models.loading.pipeline import dtype_of
from models.loading.specs import DEMO
from tests.support.server_process import ROOT

INTEL = "processor\t: 0\nmodel name\t: A Xeon\nflags\t\t: fpu avx2 avx512f amx_bf16 amx_tile\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16 sve\n\n"


def fake_cpu(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Fake a CPU with these flags, as PyTorch reports them."""
    capabilities = dict.fromkeys(("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "bf16"), False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities | dict.fromkeys(names, True))
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: True)


@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "bf16"])
def test_bfloat16_where_the_cpu_has_instructions_for_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fake_cpu(monkeypatch, name)
    assert dtype_for("auto", "cpu") == torch.bfloat16


@pytest.mark.parametrize("names", [(), ("avx2",), ("avx2", "avx512_f")])
def test_float32_where_bfloat16_would_be_emulated(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    fake_cpu(monkeypatch, *names)
    assert dtype_for("auto", "cpu") == torch.float32
    assert dtype_of(EngineConfig(DEMO, "", "cpu")) == torch.float32


def test_float32_only_where_the_weights_fit_at_twice_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch)
    half = psutil.virtual_memory().total // 2
    assert dtype_for("auto", "cpu", half) == torch.float32
    assert dtype_for("auto", "cpu", half + 1) == torch.bfloat16


@pytest.mark.parametrize("names", [(), ("amx_bf16",)])
def test_the_setting_overrides_the_flags(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    fake_cpu(monkeypatch, *names)
    for dtype in (torch.bfloat16, torch.float32):
        assert dtype_for(str(dtype).removeprefix("torch."), "cpu") == dtype


def test_a_gpu_computes_in_bfloat16() -> None:
    assert {dtype_for(name, "cuda") for name in ("auto", "bfloat16")} == {torch.bfloat16}
    with pytest.raises(OSError, match="--dtype float32 is for CPUs"):
        dtype_for("float32", "cuda")


def test_an_older_cpu_can_be_simulated() -> None:
    """`make test CPU=avx2` sets this variable."""
    code = "from models.loading import cpu; print(cpu.has_bfloat16())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert result.stdout.split() == [b"False"]


@pytest.mark.parametrize(
    ("text", "expected"), [(INTEL, "A Xeon (avx2 avx512f amx_bf16)"), (ARM, f"{os.uname().machine} (asimd bf16)")]
)
def test_the_cpu_is_named_with_its_flags(monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    assert cpu.describe() == expected


def test_without_proc_the_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: Any) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr(Path, "read_text", refuse)
    assert cpu.describe() == os.uname().machine


def test_the_time_of_a_step_with_full_size_weights_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "matmul_rate", lambda self, dtype: 0.5e12)
    description = Device("cpu").step_description(FLUX_DEV, torch.float32)
    seconds = step_flops(FLUX_DEV, 1024 * 768 // 256, 512) / 0.5e12
    assert description.startswith(f"a step at 1024x768 takes at least {seconds:.0f} s, and an image of 28 steps 52 min")
    assert "0.5000 TFLOP/s in float32" in description


def test_matrices_stop_growing_once_a_product_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    device, sides = Device("cpu"), list[int]()
    clock = iter(range(100))
    monkeypatch.setattr(device, "now", lambda: float(next(clock)))

    def record_side(side: int, *_: int, **__: Any) -> torch.Tensor:
        sides.append(side)
        return torch.ones(2, 2)

    monkeypatch.setattr("torch.randn", record_side)
    assert device.matmul_rate(torch.bfloat16) == 2 * 256**3
    assert sides == [256, 256]
