"""The first start on a machine whose driver does not work: the operator reads why, and the CPU generates images."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from tests.support.server_process import ROOT, serving

pytestmark = pytest.mark.cuda

#: What a driver answers, by the stub's variables, and the part of PyTorch's message that names the cause.
DRIVERS = {
    "no driver": ({}, "Found no NVIDIA driver on your system"),
    "a driver for an older CUDA": ({"STUB_DRIVER_VERSION": "12040"}, r"driver .* too old \(found version 12040\)"),
    "no GPU": ({"STUB_DRIVER_ERROR": "100"}, "No CUDA GPUs are available"),
    "a GPU that is not initialized": ({"STUB_DRIVER_ERROR": "802"}, "Error 802: system not yet initialized"),
    "a library of another version": ({"STUB_DRIVER_ERROR": "803"}, "Error 803: .* unsupported .* driver combination"),
    "an unknown error": ({"STUB_DRIVER_ERROR": "999"}, "CUDA unknown error"),
}


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the stub of NVIDIA's driver; return its directory."""
    directory = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("stub_driver.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", directory / "libcuda.so.1", source], check=True)
    return directory


@pytest.fixture(params=DRIVERS)
def cause(request: pytest.FixtureRequest, stub: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Install a driver that does not work; return the cause, as a pattern."""
    assert torch.version.cuda and not torch.cuda.is_available(), "needs PyTorch for CUDA, and no GPU"
    variables, found = DRIVERS[request.param]
    if variables:
        monkeypatch.setenv("LD_LIBRARY_PATH", str(stub))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield found


def test_an_image_comes_out_and_the_log_says_why_no_gpu_is_used(cause: str, tmp_path: Path) -> None:
    with serving(tmp_path, "demo") as server:
        server.ready().wait_for(f"no GPU is used: PyTorch .* built for CUDA .* says: .*{cause}")
        body = {"prompt": "a red apple", "image_size": {"width": 256, "height": 256}, "num_inference_steps": 2}
        response = httpx.post(f"{server.url}/fal-ai/flux/dev", json=body, timeout=60)
        assert response.status_code == 200, response.text
        assert httpx.get(response.json()["images"][0]["url"]).content[:2] == b"\xff\xd8"


def test_a_server_that_must_use_the_gpu_ends_and_says_why(cause: str, tmp_path: Path) -> None:
    with serving(tmp_path, "demo", device="cuda") as server:
        server.wait_for(f"--device cuda: PyTorch .* says: .*{cause}.*; or use --device cpu")
        assert server.process.wait(60) != 0


def test_the_doctor_says_why(cause: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "doctor", "demo", "--data-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
    assert "no GPU is used: PyTorch" in done.stdout
    assert re.search(cause, " ".join(done.stdout.split()))
