"""`flux-server pull` from a stand-in for the hub, and `serve` of what it brought."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from models.loading import hub as hub_module
from tests.support.fake_hub import Hub, stand_in_hub, write_checker, write_flux_dev
from tests.support.server_process import ROOT, serving

FLUX_DEV = "black-forest-labs/FLUX.1-dev"
CHECKER = "Falconsai/nsfw_image_detection"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hub")
    write_flux_dev(folder / "flux")
    write_checker(folder / "checker")
    return {FLUX_DEV: folder / "flux", CHECKER: folder / "checker"}


@pytest.fixture
def hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    with stand_in_hub(repositories) as running:
        yield running


def environment(hub: Hub, cache: Path, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "FAL_", "FLUX_SERVER_"))}
    # Xet is the hub's own transport, which a stand-in does not speak.
    return {**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **more}


def pull(hub: Hub, cache: Path, hub_id: str = FLUX_DEV, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "pull", hub_id]
    return subprocess.run(
        command, cwd=ROOT, env=environment(hub, cache, **more), capture_output=True, text=True, timeout=100
    )


def snapshot(cache: Path, hub_id: str = FLUX_DEV) -> Path:
    (folder,) = (cache / "hub" / f"models--{hub_id.replace('/', '--')}" / "snapshots").iterdir()
    return folder


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_pull_brings_what_the_pipeline_needs_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    done = pull(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "%|" in done.stderr, "no progress bar was shown"
    brought = files_of(snapshot(tmp_path))
    assert {name for name in brought if name.startswith("transformer/")} >= {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    }
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json"} <= brought
    unwanted = {"flux1-dev.safetensors", "ae.safetensors", "README.md", "LICENSE.md", "dev_grid.jpg"}
    assert not brought & {*unwanted, "vae/diffusion_pytorch_model.bin"}
    assert not {name.rpartition("/")[2] for name in hub.asked} & {*unwanted, "diffusion_pytorch_model.bin"}
    assert hub_module.missing_components(snapshot(tmp_path)) == []
    assert hub_module.missing_components(snapshot(tmp_path, CHECKER)) == []


def test_files_that_break_off_come_whole_all_the_same(hub: Hub, tmp_path: Path) -> None:
    hub.breaks_off = 50_000
    done = pull(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub_module.missing_components(snapshot(tmp_path)) == []
    source, brought = hub.repositories[FLUX_DEV], snapshot(tmp_path)
    weights = [name for name in files_of(brought) if name.endswith(".safetensors")]
    assert all((brought / name).read_bytes() == (source / name).read_bytes() for name in weights)


def test_after_a_kill_what_is_whole_does_not_come_again(hub: Hub, tmp_path: Path) -> None:
    hub.stalls_at = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
    command = [sys.executable, "-m", "server", "pull", FLUX_DEV]
    with subprocess.Popen(command, cwd=ROOT, env=environment(hub, tmp_path), stderr=subprocess.DEVNULL) as pulling:
        assert hub.has_stalled.wait(60)
        pulling.kill()
    # The other files of the first try that came whole before the kill.
    whole = files_of(snapshot(tmp_path)) - {hub.stalls_at}
    assert hub_module.missing_components(snapshot(tmp_path)) != []
    hub.stalls_at, hub.asked = None, []
    hub.goes_on.set()
    done = pull(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub_module.missing_components(snapshot(tmp_path)) == []
    assert whole
    assert not whole & set(hub.asked)


def test_a_licence_that_was_not_accepted_is_said_so(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add(FLUX_DEV)
    refused = pull(hub, tmp_path)
    assert refused.returncode == 1
    assert "accept its license" in refused.stderr
    assert f"{hub.url}/{FLUX_DEV}" in refused.stderr
    assert "HF_TOKEN" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert pull(hub, tmp_path, HF_TOKEN=hub.token).returncode == 0


def test_no_such_repository(hub: Hub, tmp_path: Path) -> None:
    refused = pull(hub, tmp_path, "nobody/nothing")
    assert refused.returncode == 1
    assert "nobody/nothing does not exist on the hub" in refused.stderr


def test_no_hub(hub: Hub, tmp_path: Path) -> None:
    refused = pull(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert refused.returncode == 1
    assert "could not be reached" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_serve_of_what_was_pulled_opens_no_connection(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pull(hub, tmp_path).returncode == 0
    hub.close()
    # Whatever address but loopback the server would connect to, or look up, it dies of it.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def watch(event, arguments):\n"
        "    address = arguments[1] if event == 'socket.connect' else arguments[0]\n"
        "    host = address[0] if isinstance(address, tuple) else address\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo') and host not in ('127.0.0.1', 'localhost', None):\n"
        "        os.write(2, f'CONNECTED {event} {host}\\n'.encode())\n"
        "        os._exit(99)\n"
        "sys.addaudithook(lambda event, arguments: watch(event, arguments) if event in"
        " ('socket.connect', 'socket.getaddrinfo') else None)\n"
    )
    for name, value in environment(hub, tmp_path, PYTHONPATH=str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    with serving(tmp_path / "data", FLUX_DEV) as server:
        server.ready()
        body = {"prompt": "a red apple", "image_size": "square", "num_inference_steps": 2, "seed": 1}
        answer = httpx.post(f"{server.url}/fal-ai/flux/dev", json=body, timeout=60).raise_for_status().json()
        assert answer["has_nsfw_concepts"] == [False]
        assert (answer["images"][0]["width"], answer["images"][0]["height"]) == (512, 512)
        assert httpx.get(answer["images"][0]["url"]).headers["content-type"] == "image/jpeg"


def test_serve_pulls_what_is_not_here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(hub, tmp_path).items():
        monkeypatch.setenv(name, value)
    with serving(tmp_path / "data", FLUX_DEV) as server:
        server.ready()
    assert hub_module.missing_components(snapshot(tmp_path)) == []


def test_doctor_tells_what_is_here(hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "doctor", FLUX_DEV, "--port", "0", "--tls-port", "0"]
    command += ["--retention-gb", "0.001", "--data-dir", str(tmp_path / "data")]
    options = {"cwd": ROOT, "env": environment(hub, tmp_path), "capture_output": True, "text": True, "timeout": 60}
    before = subprocess.run(command, **options)  # type: ignore[call-overload]
    assert before.returncode == 1
    assert f"✗ {FLUX_DEV}: not downloaded yet; run `flux-server pull {FLUX_DEV}`" in before.stdout
    assert pull(hub, tmp_path).returncode == 0
    after = subprocess.run(command, **options)  # type: ignore[call-overload]
    assert after.returncode == 0, after.stdout
    assert f"✓ {FLUX_DEV}: weights are here" in after.stdout
    assert f"✓ safety checker: {CHECKER} is here" in after.stdout
