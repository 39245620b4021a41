"""`flux-server bench`: the whole command on tiny weights that nobody trained."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server_process import ROOT


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_every_way_is_measured_beside_the_pipeline(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sizes = "96x64,64x64"
    given = ("--random-weights", "tiny", "--sizes", sizes, "--steps", "2", "--rounds", "2", "--waiting", "2")
    done = bench(*given, "--device", "cpu", "--data-dir", str(tmp_path), "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert (found["weights"], found["memory_plan"], found["eager_difference"]) == ("random, tiny", "resident", 0)
    assert found["matmul_tflop_per_second"] > 0
    ways = [(figure["way"], figure["size"]) for figure in found["figures"]]
    assert ways == [(way, size) for size in sizes.split(",") for way in ("naive", "eager", "regular")]
    for figure in found["figures"]:
        assert figure["seconds"] > 0
        # Steps are a part of the whole, and a share of what the device can do at most.
        if figure["way"] != "naive":
            assert 0 < figure["ms_per_step"] / 1000 * figure["num_steps"] < figure["seconds"]
            assert 0 < figure["share"] < 1
    lines = done.stdout.splitlines()
    assert any(line.split()[:2] == ["regular", "64x64"] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--random-weights", "huge"), "huge is not one of tiny, full"),
        (("--sizes", "big"), "big is not WIDTHxHEIGHT"),
        (("--memory", "float3"), "--memory"),
        (("nowhere/at/all",), "nowhere/at/all"),
    ],
)
def test_what_it_cannot_measure_is_refused(arguments: tuple[str, ...], words: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
