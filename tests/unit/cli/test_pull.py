"""Tests of `flux-server pull` from a fake hub, and of `serve` with the downloaded weights."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from models.loading import hub as hub_module
from models.loading.pipeline import quantization_of
from tests.support.fake_hub import Hub, running_hub, write_checker, write_flux_dev
from tests.support.server_process import ROOT, serving
from tests.support.single_files import write_gguf
from tests.support.tiny_kinds import write_control_lora

FLUX_DEV = "black-forest-labs/FLUX.1-dev"
CHECKER = "Falconsai/nsfw_image_detection"
CANNY_LORA = "black-forest-labs/FLUX.1-Canny-dev-lora"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("hub")
    write_flux_dev(directory / "flux")
    write_checker(directory / "checker")
    (directory / "lora").mkdir()
    write_control_lora(directory / "lora" / "flux1-canny-dev-lora.safetensors", 0, 64, (2, 32))
    (directory / "lora" / "README.md").write_bytes(b"not needed")
    return {FLUX_DEV: directory / "flux", CHECKER: directory / "checker", CANNY_LORA: directory / "lora"}


@pytest.fixture
def hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    with running_hub(repositories) as running:
        yield running


def environment(hub: Hub, cache: Path, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "FAL_", "FLUX_SERVER_"))}
    # The fake hub does not support Xet, the hub's transfer protocol.
    return {**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **more}


def pull(hub: Hub, cache: Path, hub_id: str = FLUX_DEV, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "pull", hub_id]
    return subprocess.run(
        command, cwd=ROOT, env=environment(hub, cache, **more), capture_output=True, text=True, timeout=100
    )


def snapshot(cache: Path, hub_id: str = FLUX_DEV) -> Path:
    (directory,) = (cache / "hub" / f"models--{hub_id.replace('/', '--')}" / "snapshots").iterdir()
    return directory


def files_of(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_pull_downloads_only_the_files_that_the_pipeline_needs(hub: Hub, tmp_path: Path) -> None:
    completed = pull(hub, tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert "%|" in completed.stderr, "no progress bar was shown"
    downloaded = files_of(snapshot(tmp_path))
    assert {name for name in downloaded if name.startswith("transformer/")} >= {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    }
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json"} <= downloaded
    unwanted = {"flux1-dev.safetensors", "ae.safetensors", "README.md", "LICENSE.md", "dev_grid.jpg"}
    assert not downloaded & {*unwanted, "vae/diffusion_pytorch_model.bin"}
    assert not {name.rpartition("/")[2] for name in hub.requested_files} & {*unwanted, "diffusion_pytorch_model.bin"}
    assert hub_module.missing_components(snapshot(tmp_path)) == []
    assert hub_module.missing_components(snapshot(tmp_path, CHECKER)) == []


def test_a_control_lora_is_pulled_and_found_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    for _ in range(2):
        completed = pull(hub, tmp_path, CANNY_LORA)
        assert completed.returncode == 0, completed.stderr
    file = snapshot(tmp_path, CANNY_LORA) / "flux1-canny-dev-lora.safetensors"
    assert files_of(file.parent) == {file.name}
    hub.close()
    program = (
        f"from models.loading import specs; print(specs.find_control_loras({FLUX_DEV!r}, specs.CONTROL_LORAS.values()))"
    )
    found = subprocess.check_output(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(hub, tmp_path), text=True
    )
    assert found.strip() == repr({"canny": file})


def test_a_repository_with_several_files_is_no_lora(hub: Hub, tmp_path: Path) -> None:
    hub.repositories = {**hub.repositories, CANNY_LORA: hub.repositories[FLUX_DEV]}
    completed = pull(hub, tmp_path, CANNY_LORA)
    assert completed.returncode == 1
    assert "does not hold exactly one safetensors file" in completed.stderr


def test_interrupted_downloads_are_completed(hub: Hub, tmp_path: Path) -> None:
    hub.truncate_at = 50_000
    completed = pull(hub, tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert hub_module.missing_components(snapshot(tmp_path)) == []
    source, downloaded = hub.repositories[FLUX_DEV], snapshot(tmp_path)
    weights = [name for name in files_of(downloaded) if name.endswith(".safetensors")]
    assert all((downloaded / name).read_bytes() == (source / name).read_bytes() for name in weights)


def test_complete_files_are_not_downloaded_again_after_a_kill(hub: Hub, tmp_path: Path) -> None:
    hub.stalling_file = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
    command = [sys.executable, "-m", "server", "pull", FLUX_DEV]
    with subprocess.Popen(command, cwd=ROOT, env=environment(hub, tmp_path), stderr=subprocess.DEVNULL) as pulling:
        assert hub.has_stalled.wait(60)
        pulling.kill()
    # The files that the first attempt completed before the kill.
    complete = files_of(snapshot(tmp_path)) - {hub.stalling_file}
    assert hub_module.missing_components(snapshot(tmp_path)) != []
    hub.stalling_file, hub.requested_files = None, []
    hub.resume.set()
    completed = pull(hub, tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert hub_module.missing_components(snapshot(tmp_path)) == []
    assert complete
    assert not complete & set(hub.requested_files)


def test_nothing_is_downloaded_from_a_repository_that_is_not_in_diffusers_layout(tmp_path: Path) -> None:
    (tmp_path / "srpo").mkdir()
    (tmp_path / "srpo" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(1000))
    with running_hub({"tencent/SRPO": tmp_path / "srpo"}) as hub:
        result = pull(hub, tmp_path / "cache", "tencent/SRPO")
    assert result.returncode == 1
    assert "tencent/SRPO has neither model_index.json nor config.json" in result.stderr
    assert "to serve one of its files, name tencent/SRPO/FILE and a --base" in result.stderr
    assert hub.requested_files == []


@pytest.mark.parametrize("name", ["sub/flux-Q8_0.gguf", pytest.param("flux.safetensors", marks=pytest.mark.thorough)])
def test_of_the_base_of_a_file_only_what_the_file_lacks_is_pulled(
    hub: Hub, repositories: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "files" / "sub").mkdir(parents=True)
    tensors = FluxTransformer2DModel.from_pretrained(repositories[FLUX_DEV] / "transformer").state_dict()
    if name.endswith(".gguf"):
        write_gguf(tmp_path / "files" / name, tensors, "Q8_0")
    else:
        save_file(tensors, tmp_path / "files" / name)
    hub.repositories = {**hub.repositories, "city/flux": tmp_path / "files"}
    cache, place = tmp_path / "cache", f"city/flux/{name}"
    completed = pull(hub, cache, place, FLUX_SERVER_BASE=FLUX_DEV)
    assert completed.returncode == 0, completed.stderr
    downloaded = files_of(snapshot(cache))
    assert {name for name in downloaded if name.startswith("transformer/")} == {"transformer/config.json"}
    assert hub_module.missing_components(snapshot(cache)) == ["transformer"]
    assert files_of(snapshot(cache, "city/flux")) == {name}
    hub.close()
    for name, value in environment(hub, cache).items():
        monkeypatch.setenv(name, value)
    with serving(tmp_path / "data", f"fal-ai/flux/dev={place}", base=FLUX_DEV) as server:
        body = {"prompt": "a fish", "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}
        httpx.post(f"{server.ready().url}/fal-ai/flux/dev", json=body, timeout=60).raise_for_status()


def test_a_quantized_pipeline_is_pulled_like_any_other(hub: Hub, repositories: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(repositories[FLUX_DEV], tmp_path / "quantized")
    config = tmp_path / "quantized" / "transformer" / "config.json"
    quantized = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": quantized}))
    hub.repositories = {**hub.repositories, "city/flux-int8": tmp_path / "quantized"}
    completed = pull(hub, tmp_path / "cache", "city/flux-int8")
    assert completed.returncode == 0, completed.stderr
    directory = snapshot(tmp_path / "cache", "city/flux-int8")
    assert hub_module.missing_components(directory) == []
    assert quantization_of(directory) == "torchao Int8WeightOnlyConfig"


def test_a_file_that_the_hub_does_not_have_is_reported(hub: Hub, tmp_path: Path) -> None:
    place = f"{FLUX_DEV}/flux1-dev-Q4_0.gguf"
    result = pull(hub, tmp_path, place, FLUX_SERVER_BASE=FLUX_DEV)
    assert result.returncode == 1
    assert f"{place} does not exist on the hub" in result.stderr
    result = pull(hub, tmp_path, place)
    assert result.returncode == 1
    assert "name the weights that give them with --base" in result.stderr


def test_an_unaccepted_license_is_reported(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add(FLUX_DEV)
    result = pull(hub, tmp_path)
    assert result.returncode == 1
    assert "accept its licence" in result.stderr
    assert f"{hub.url}/{FLUX_DEV}" in result.stderr
    assert "HF_TOKEN" in result.stderr
    assert "Traceback" not in result.stderr
    assert pull(hub, tmp_path, HF_TOKEN=hub.token).returncode == 0


def test_an_unknown_repository_is_reported(hub: Hub, tmp_path: Path) -> None:
    result = pull(hub, tmp_path, "nobody/nothing")
    assert result.returncode == 1
    assert "nobody/nothing does not exist on the hub" in result.stderr


def test_an_unreachable_hub_is_reported(hub: Hub, tmp_path: Path) -> None:
    result = pull(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 1
    assert "could not be reached" in result.stderr
    assert "Traceback" not in result.stderr


def test_serve_with_pulled_weights_opens_no_connection(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pull(hub, tmp_path).returncode == 0
    hub.close()
    # The server exits if it connects to, or resolves, any address but loopback.
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
        response = httpx.post(f"{server.url}/fal-ai/flux/dev", json=body, timeout=60).raise_for_status().json()
        assert response["has_nsfw_concepts"] == [False]
        assert (response["images"][0]["width"], response["images"][0]["height"]) == (512, 512)
        assert httpx.get(response["images"][0]["url"]).headers["content-type"] == "image/jpeg"


def test_serve_pulls_missing_weights(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(hub, tmp_path).items():
        monkeypatch.setenv(name, value)
    with serving(tmp_path / "data", FLUX_DEV) as server:
        server.ready()
    assert hub_module.missing_components(snapshot(tmp_path)) == []


def test_doctor_shows_which_weights_are_downloaded(hub: Hub, tmp_path: Path) -> None:
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
