"""Tests of `flux-server bench`: the whole command on tiny, untrained weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server_process import ROOT


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_every_way_is_measured_alongside_the_pipeline(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sizes = "96x64,64x64"
    options = ("--random-weights", "tiny", "--sizes", sizes, "--steps", "2", "--rounds", "2", "--waiting", "2")
    completed = bench(*options, "--device", "cpu", "--data-dir", str(tmp_path), "--json", str(file))
    assert completed.returncode == 0, completed.stderr
    report = json.loads(file.read_text())
    assert (report["weights"], report["memory_plan"], report["eager_difference"]) == ("random, tiny", "resident", 0)
    assert report["matmul_tflop_per_second"] > 0
    ways = [(figure["way"], figure["size"]) for figure in report["figures"]]
    assert ways == [(way, size) for size in sizes.split(",") for way in ("naive", "eager", "regular")]
    for figure in report["figures"]:
        assert figure["seconds"] > 0
        # The steps take only part of the time, and reach only a share of the device's peak rate.
        if figure["way"] != "naive":
            assert 0 < figure["ms_per_step"] / 1000 * figure["num_steps"] < figure["seconds"]
            assert 0 < figure["share"] < 1
    lines = completed.stdout.splitlines()
    assert any(line.split()[:2] == ["regular", "64x64"] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--random-weights", "huge"), "huge is not one of tiny, full"),
        (("--sizes", "big"), "big is not WIDTHxHEIGHT"),
        (("--memory", "float3"), "--memory"),
        (("nowhere/at/all",), "nowhere/at/all"),
    ],
)
def test_arguments_that_cannot_be_measured_are_rejected(arguments: tuple[str, ...], message: str) -> None:
    completed = bench(*arguments)
    assert completed.returncode == 2
    assert message in completed.stderr
