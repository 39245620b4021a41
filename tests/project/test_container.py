"""The container image and the compose file: linted, parsed, and with the marker `container` built and run."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from server.cli.main import cli
from server.settings import PREFIX, Settings
from tests.support.server_process import ROOT, Server

BIN = Path(sys.executable).parent
COMPOSE = ROOT / "docker-compose.yml"
CONSTRAINTS = ROOT / "constraints"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
SCRIPT = ROOT / "tests" / "project" / "container" / "build.sh"
SERVICES = ("flux", "demo")
CLUSTER = ("head", "worker-0", "worker-1")
KUBERAY = ROOT / "deploy" / "kuberay.yaml"
_UNITS = {"s": 1, "m": 60, "h": 3600}


def compose(**variables: str) -> dict[str, Any]:
    """Read the compose file with these variables."""
    found: dict[str, Any] = _filled(yaml.safe_load(COMPOSE.read_text(encoding="utf-8")), variables)
    return found


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    """Replace ${NAME:-default} as compose does: in the values, after parsing."""
    if isinstance(value, dict):
        return {name: _filled(each, variables) for name, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, variables) for each in value]
    if not isinstance(value, str):
        return value
    filled = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1]) or found[2], value)
    assert "$" not in filled.replace("$$", ""), "compose warns of a variable without a default"
    return filled.replace("$$", "$")


def service(name: str, **variables: str) -> Any:
    """Return one service of the compose file."""
    return compose(**variables)["services"][name]


def started(*profiles: str, named: str = "") -> set[str]:
    """Return the services that `docker compose --profile PROFILE up NAMED` starts.

    These are the named service or, without a name, those without a profile and those of the given profiles.
    """
    if named:
        return {named}
    services = compose()["services"].items()
    return {name for name, each in services if not each.get("profiles") or {*each["profiles"]} & {*profiles}}


def seconds(duration: str) -> int:
    """Convert a duration of compose, such as "90s" or "4h", to seconds."""
    return int(duration[:-1]) * _UNITS[duration[-1]]


def instruction(name: str) -> str:
    """Return the arguments of the last instruction of this name in the Dockerfile."""
    found: list[str] = re.findall(rf"(?m)^{name}\s+(.*)$", DOCKERFILE)
    return found[-1]


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; return its exit code and output."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def test_the_dockerfile_passes_the_linter() -> None:
    done = run(BIN / "hadolint", "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_runs_as_an_unprivileged_user() -> None:
    user, group = instruction("USER").split(":")
    assert int(user) > 1000
    assert int(group) > 1000
    assert instruction("STOPSIGNAL") == "SIGTERM"
    assert json.loads(instruction("ENTRYPOINT")) == ["flux-server"]
    assert json.loads(instruction("CMD")) == ["serve", "demo"]


def test_the_build_context_is_small() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    # The file excludes everything except the listed names, so .git, .venv and .env never enter the image.
    assert lines[0] == "*"
    admitted = {line[1:] for line in lines if line.startswith("!")}
    packages = {"flux_server_testing", "models", "server"}
    assert admitted == {"constraints", "pyproject.toml", "README.md", "LICENSE", "NOTICE", *packages}
    assert all((ROOT / name).exists() for name in admitted)
    assert "**/__pycache__" in lines


def health_check(port: int) -> int:
    """Run the health check of the image against this port; return its exit code."""
    program, *arguments = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
    assert program == "python"
    # The health check must ignore the proxy.
    environment = {**os.environ, f"{PREFIX}PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    return run(sys.executable, *arguments, env=environment).returncode


def test_the_health_check_detects_a_missing_server(server: Server) -> None:
    assert health_check(int(server.url.rpartition(":")[2])) == 0
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        assert health_check(silent.getsockname()[1]) != 0


def test_the_compose_file_follows_the_specification() -> None:
    done = run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_services_that_each_command_starts() -> None:
    assert set(compose()["services"]) == {*SERVICES, *CLUSTER}
    assert started() == {"flux"}
    assert started(named="demo") == {"demo"}
    assert started("demo") == {"flux", "demo"}
    assert started("cluster") == {"flux", *CLUSTER}


def test_docker_compose_reads_the_file_the_same_way(tmp_path: Path) -> None:
    base = ("docker", "compose", "--project-directory", tmp_path)
    if not shutil.which("docker") or run(*base, "version").returncode != 0:
        pytest.skip("needs docker compose")
    shutil.copy(COMPOSE, tmp_path)
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    for options, named in (((), ""), (("--profile", "demo"), ""), ((), "demo")):
        done = run(*base, *options, "config", "--format", "json", *([named] if named else []), env=clean)
        assert (done.returncode, done.stderr) == (0, "")
        services = json.loads(done.stdout)["services"]
        assert set(services) == started(*options[1:], named=named)
        for each in services.values():
            assert {port["host_ip"] for port in each["ports"]} == {"127.0.0.1"}


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_on_loopback_by_default(name: str) -> None:
    assert service(name)["ports"] == ["127.0.0.1:8000:8000", "127.0.0.1:8443:8443"]
    public = service(name, FLUX_PUBLISH="0.0.0.0", FLUX_PORT="80", FLUX_TLS_PORT="443")
    assert public["ports"] == ["0.0.0.0:80:8000", "0.0.0.0:443:8443"]
    assert {port.rpartition(":")[2] for port in public["ports"]} == {*instruction("EXPOSE").split()}


@pytest.mark.parametrize("name", SERVICES)
def test_only_the_volumes_are_writable(name: str) -> None:
    found = service(name)
    assert found["read_only"] is True
    assert found["tmpfs"] == ["/tmp"]
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    volumes = dict(volume.split(":") for volume in found["volumes"])
    assert set(volumes) <= set(compose()["volumes"])
    assert sorted(volumes.values()) == sorted(json.loads(instruction("VOLUME")))


@pytest.mark.parametrize("name", [*SERVICES, *CLUSTER])
def test_compiled_code_is_kept_on_a_volume(name: str) -> None:
    """Keep compiled code, which is a program, off /tmp: Docker mounts /tmp so that no program in it can run."""
    configured = service(name)
    is_worker = name.startswith("worker")
    directory = configured["environment"]["XDG_CACHE_HOME" if is_worker else "FLUX_SERVER_DATA_DIR"]
    targets = [volume.split(":")[1] for volume in configured["volumes"]]
    assert any(Path(directory).is_relative_to(target) for target in targets)
    assert "/tmp" in configured["tmpfs"]


def test_the_demo_has_a_separate_queue() -> None:
    flux, demo = ({*service(name)["volumes"]} for name in SERVICES)
    assert flux & demo == {"models:/models"}


@pytest.mark.parametrize("name", SERVICES)
def test_services_restart_and_stop_gracefully(name: str) -> None:
    found = service(name)
    assert found["restart"] == "unless-stopped"
    assert found["init"] is True
    assert seconds(found["stop_grace_period"]) > Settings.model_fields["shutdown_grace"].default
    # The compose file does not replace the health check of the image.
    assert "test" not in found.get("healthcheck", {})


@pytest.mark.parametrize("name", SERVICES)
def test_the_image_is_built_locally_and_never_pulled(name: str) -> None:
    found = service(name, TORCH_DEVICE="cpu", TORCH_INDEX="https://example.com/cpu")
    assert "image" not in found
    assert found["build"] == {"context": ".", "args": {"TORCH_DEVICE": "cpu", "TORCH_INDEX": "https://example.com/cpu"}}
    assert service(name)["build"]["args"] == {"TORCH_DEVICE": "cuda", "TORCH_INDEX": ""}
    assert {"ARG TORCH_DEVICE=cuda", 'ARG TORCH_INDEX=""'} <= set(DOCKERFILE.splitlines())


def test_the_constraints_of_both_devices_differ_only_in_pytorch() -> None:
    lines = {name: (CONSTRAINTS / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in ("cpu", "cuda")}
    for found in lines.values():
        assert next(line for line in found if line[:1] != "#") == "-c packages.txt"
    pinned = {name: {line.partition("==")[0] for line in found if "==" in line} for name, found in lines.items()}
    # Triton comes with PyTorch's builds for CUDA only.
    assert pinned == {"cpu": {"torch"}, "cuda": {"torch", "triton"}}
    shared = (CONSTRAINTS / "packages.txt").read_text(encoding="utf-8")
    assert not re.search(r"^(torch|triton|cuda-\w+)==", shared, re.MULTILINE)


@pytest.mark.parametrize("name", SERVICES)
def test_the_server_accepts_its_environment(name: str) -> None:
    found = service(name, FAL_KEY="alice:secret")
    settings = Settings.load(found["environment"])
    assert settings.keys == ("alice:secret",)
    assert settings.data_dir == Path("/data")
    # Variables that only compose reads must not look like settings, or the server would refuse to start.
    assert not re.findall(rf"\$\{{({PREFIX}\w+)", COMPOSE.read_text(encoding="utf-8"))
    assert found["env_file"] == [{"path": ".env", "required": False}]


@pytest.mark.parametrize(
    ("pull_exit_code", "expected"), [(0, ["pull some/model", "serve some/model"]), (1, ["pull some/model"])]
)
def test_flux_is_served_after_it_is_pulled(tmp_path: Path, pull_exit_code: int, expected: list[str]) -> None:
    stand_in = tmp_path / "flux-server"
    stand_in.write_text(f'#!/bin/sh\necho "$@"\n[ "$1" = serve ] || exit {pull_exit_code}\n')
    stand_in.chmod(0o755)
    found = service("flux", FLUX_MODEL="some/model")
    done = run(*found["entrypoint"], *found["command"], env={**found["environment"], "PATH": str(tmp_path)})
    assert (done.returncode, done.stdout.splitlines()) == (pull_exit_code, expected)
    assert {"pull", "serve"} <= {command.callback.__name__ for command in cli.registered_commands if command.callback}


def test_flux_waits_for_its_weights() -> None:
    found = service("flux", HF_TOKEN="hf_x")
    assert found["environment"]["FLUX_MODEL"] == "black-forest-labs/FLUX.1-dev"
    assert found["environment"]["HF_TOKEN"] == "hf_x"
    # Downloading 34 GB at 20 Mbit/s must fit into the start period.
    assert seconds(found["healthcheck"]["start_period"]) > 34e9 * 8 / 20e6


def test_flux_has_a_gpu_and_the_demo_none() -> None:
    found = service("flux")
    assert found["environment"]["FLUX_SERVER_DEVICE"] == "cuda"
    (device,) = found["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    demo = service("demo")
    assert "deploy" not in demo
    assert demo["environment"]["FLUX_SERVER_DEVICE"] == "cpu"
    assert demo["command"] == ["serve", "demo"]
    assert demo["profiles"] == ["demo"]


def test_the_cluster_has_a_head_without_a_gpu_and_two_workers_with_one_gpu_each() -> None:
    head, *workers = (service(name, RAY_AUTH_TOKEN="secret", FAL_KEY="alice:secret") for name in CLUSTER)
    assert "deploy" not in head
    settings = Settings.load(head["environment"], {"ray": "auto"})
    assert settings.keys == ("alice:secret",)
    assert head["command"][0].endswith('flux-server serve "$FLUX_MODEL" --ray auto')
    assert head["ports"] == service("flux")["ports"]
    devices = [worker["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for worker in workers]
    assert devices == [["0"], ["1"]]
    for found in (head, *workers):
        assert found["build"]["args"]["RAY"] == "1"
        assert (found["environment"]["RAY_AUTH_MODE"], found["environment"]["RAY_AUTH_TOKEN"]) == ("token", "secret")
        assert (found["read_only"], found["cap_drop"], found["restart"]) == (True, ["ALL"], "unless-stopped")
    # Workers receive neither the keys nor the data of the head.
    assert all("FAL_KEY" not in found["environment"] and found["volumes"] == ["models:/models"] for found in workers)
    assert all(found["ports"] == [] for found in workers)
    assert 'ARG RAY=""' in DOCKERFILE


def test_the_manifest_for_kubernetes_serves_and_grows() -> None:
    *claims, cluster = yaml.safe_load_all(KUBERAY.read_text(encoding="utf-8"))
    spec = cluster["spec"]
    constraints = (CONSTRAINTS / "packages.txt").read_text(encoding="utf-8")
    assert f"ray=={spec['rayVersion']}\n" in constraints
    assert (spec["enableInTreeAutoscaling"], spec["authOptions"]["mode"]) == (True, "token")
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    environment = {each["name"]: each["value"] for each in head["env"]}
    settings = Settings.load(environment, {"ray": "auto"})
    (workers,) = spec["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (settings.min_gpus, settings.max_gpus)
    (worker,) = workers["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "flux-server serve black-forest-labs/FLUX.1-dev --ray auto" in head["args"][0]
    claimed = {
        volume["persistentVolumeClaim"]["claimName"] for volume in spec["headGroupSpec"]["template"]["spec"]["volumes"]
    }
    assert claimed == {claim["metadata"]["name"] for claim in claims}


@pytest.mark.parametrize("name", ["docker.md", "deploy.md"])
def test_the_pages_on_deploying_name_existing_variables(name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    variables = set(re.findall(r"\b(?:FLUX|TORCH|HF|FAL)_[A-Z_]*[A-Z]\b", page))
    others = {name for name in variables if not name.startswith(PREFIX)}
    # The four names in this list belong to libraries and clients.
    assert others - {"HF_HOME", "HF_HUB_OFFLINE", "FAL_RUN_HOST", "FAL_QUEUE_RUN_HOST"} <= set(
        re.findall(r"\$\{(\w+)", COMPOSE.read_text(encoding="utf-8"))
    )
    assert {name.removeprefix(PREFIX).lower() for name in variables - others} <= set(Settings.model_fields)


@pytest.mark.container
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("buildah"), reason="needs root, buildah and debootstrap")
def test_the_image_is_built_and_generates_an_image(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image.jpg"
    process = subprocess.Popen([SCRIPT, path], stdout=sys.stderr)
    try:
        assert process.wait(3500) == 0, capfd.readouterr().err
    finally:
        # On SIGTERM, the script ends every process that it started.
        process.terminate()
        process.wait()
    with Image.open(path) as image:
        assert (image.size, image.format) == ((512, 512), "JPEG")
    with capfd.disabled():
        print(f"\n{capfd.readouterr().err}", end="")
