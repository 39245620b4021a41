"""The image and the compose file: linted, read by a parser, and with the marker `container` built and run."""

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
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
SCRIPT = ROOT / "tests" / "project" / "container" / "build.sh"
SERVICES = ("flux", "demo")
CLUSTER = ("head", "worker-0", "worker-1")
KUBERAY = ROOT / "deploy" / "kuberay.yaml"
_UNITS = {"s": 1, "m": 60, "h": 3600}


def compose(**variables: str) -> dict[str, Any]:
    """The compose file as it is with these variables."""
    found: dict[str, Any] = _filled(yaml.safe_load(COMPOSE.read_text(encoding="utf-8")), variables)
    return found


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    """With ${NAME:-default} replaced, as compose does it: in values, once they are read."""
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
    """One service of it."""
    return compose(**variables)["services"][name]


def started(*profiles: str, named: str = "") -> set[str]:
    """What `docker compose --profile PROFILE up NAMED` starts: what is named, else all that no other profile holds."""
    if named:
        return {named}
    services = compose()["services"].items()
    return {name for name, it in services if not it.get("profiles") or {*it["profiles"]} & {*profiles}}


def seconds(duration: str) -> int:
    """Of compose's "90s" or "4h"."""
    return int(duration[:-1]) * _UNITS[duration[-1]]


def instruction(name: str) -> str:
    """What the last of these in the Dockerfile says."""
    found: list[str] = re.findall(rf"(?m)^{name}\s+(.*)$", DOCKERFILE)
    return found[-1]


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command to its end, with what it said."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def test_the_linter_of_dockerfiles_agrees() -> None:
    done = run(BIN / "hadolint", "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_runs_as_nobody_in_particular() -> None:
    user, group = instruction("USER").split(":")
    assert int(user) > 1000
    assert int(group) > 1000
    assert instruction("STOPSIGNAL") == "SIGTERM"
    assert json.loads(instruction("ENTRYPOINT")) == ["flux-server"]
    assert json.loads(instruction("CMD")) == ["serve", "demo"]


def test_the_image_is_built_from_little() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    # Nothing but what is named: neither .git nor .venv, nor anybody's .env.
    assert lines[0] == "*"
    admitted = {line[1:] for line in lines if line.startswith("!")}
    assert admitted == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "models", "server"}
    assert all((ROOT / name).exists() for name in admitted)
    assert "**/__pycache__" in lines


def health_check(port: int) -> int:
    """The exit code of the image's health check where the server has this port."""
    program, *arguments = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
    assert program == "python"
    # A proxy must not come between.
    environment = {**os.environ, f"{PREFIX}PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    return run(sys.executable, *arguments, env=environment).returncode


def test_the_health_check_tells_a_server_from_none(server: Server) -> None:
    assert health_check(int(server.url.rpartition(":")[2])) == 0
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        assert health_check(silent.getsockname()[1]) != 0


def test_the_compose_file_follows_the_specification() -> None:
    done = run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_each_command_starts() -> None:
    assert set(compose()["services"]) == {*SERVICES, *CLUSTER}
    assert started() == {"flux"}
    assert started(named="demo") == {"demo"}
    assert started("demo") == {"flux", "demo"}
    assert started("cluster") == {"flux", *CLUSTER}


def test_docker_compose_reads_it_likewise(tmp_path: Path) -> None:
    base = ("docker", "compose", "--project-directory", tmp_path)
    if not shutil.which("docker") or run(*base, "version").returncode != 0:
        pytest.skip("no docker compose here")
    shutil.copy(COMPOSE, tmp_path)
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    for options, named in (((), ""), (("--profile", "demo"), ""), ((), "demo")):
        done = run(*base, *options, "config", "--format", "json", *([named] if named else []), env=clean)
        assert (done.returncode, done.stderr) == (0, "")
        services = json.loads(done.stdout)["services"]
        assert set(services) == started(*options[1:], named=named)
        for read in services.values():
            assert {port["host_ip"] for port in read["ports"]} == {"127.0.0.1"}


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_on_loopback_unless_told_otherwise(name: str) -> None:
    assert service(name)["ports"] == ["127.0.0.1:8000:8000", "127.0.0.1:8443:8443"]
    told = service(name, FLUX_PUBLISH="0.0.0.0", FLUX_PORT="80", FLUX_TLS_PORT="443")
    assert told["ports"] == ["0.0.0.0:80:8000", "0.0.0.0:443:8443"]
    assert {port.rpartition(":")[2] for port in told["ports"]} == {*instruction("EXPOSE").split()}


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_can_be_written_but_the_volumes(name: str) -> None:
    it = service(name)
    assert it["read_only"] is True
    assert it["tmpfs"] == ["/tmp"]
    assert it["cap_drop"] == ["ALL"]
    assert it["security_opt"] == ["no-new-privileges:true"]
    volumes = dict(volume.split(":") for volume in it["volumes"])
    assert set(volumes) <= set(compose()["volumes"])
    assert sorted(volumes.values()) == sorted(json.loads(instruction("VOLUME")))


def test_the_demo_has_a_queue_of_its_own() -> None:
    flux, demo = ({*service(name)["volumes"]} for name in SERVICES)
    assert flux & demo == {"models:/models"}


@pytest.mark.parametrize("name", SERVICES)
def test_it_comes_back_and_ends_in_peace(name: str) -> None:
    it = service(name)
    assert it["restart"] == "unless-stopped"
    assert it["init"] is True
    assert seconds(it["stop_grace_period"]) > Settings.model_fields["shutdown_grace"].default
    # The image's own check.
    assert "test" not in it.get("healthcheck", {})


@pytest.mark.parametrize("name", SERVICES)
def test_it_is_built_here_and_nobody_elses_is_pulled(name: str) -> None:
    it = service(name, TORCH_INDEX="https://example.com/cpu")
    assert "image" not in it
    assert it["build"] == {"context": ".", "args": {"TORCH_INDEX": "https://example.com/cpu"}}
    assert "ARG TORCH_INDEX" in DOCKERFILE


@pytest.mark.parametrize("name", SERVICES)
def test_the_server_takes_its_environment(name: str) -> None:
    it = service(name, FAL_KEY="alice:secret")
    settings = Settings.load(it["environment"])
    assert settings.keys == ("alice:secret",)
    assert settings.data_dir == Path("/data")
    # The variables of compose alone are none of the server's, which would refuse to start.
    assert not re.findall(rf"\$\{{({PREFIX}\w+)", COMPOSE.read_text(encoding="utf-8"))
    assert it["env_file"] == [{"path": ".env", "required": False}]


@pytest.mark.parametrize(
    ("pull_ends_with", "said"), [(0, ["pull some/model", "serve some/model"]), (1, ["pull some/model"])]
)
def test_flux_is_served_once_it_is_pulled(tmp_path: Path, pull_ends_with: int, said: list[str]) -> None:
    double = tmp_path / "flux-server"
    double.write_text(f'#!/bin/sh\necho "$@"\n[ "$1" = serve ] || exit {pull_ends_with}\n')
    double.chmod(0o755)
    it = service("flux", FLUX_MODEL="some/model")
    done = run(*it["entrypoint"], *it["command"], env={**it["environment"], "PATH": str(tmp_path)})
    assert (done.returncode, done.stdout.splitlines()) == (pull_ends_with, said)
    assert {"pull", "serve"} <= {command.callback.__name__ for command in cli.registered_commands if command.callback}


def test_flux_waits_for_its_weights() -> None:
    it = service("flux", HF_TOKEN="hf_x")
    assert it["environment"]["FLUX_MODEL"] == "black-forest-labs/FLUX.1-dev"
    assert it["environment"]["HF_TOKEN"] == "hf_x"
    # As long as 34 GB take at 20 Mbit/s.
    assert seconds(it["healthcheck"]["start_period"]) > 34e9 * 8 / 20e6


def test_flux_has_a_gpu_and_the_demo_none() -> None:
    it = service("flux")
    assert it["environment"]["FLUX_SERVER_DEVICE"] == "cuda"
    (device,) = it["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    demo = service("demo")
    assert "deploy" not in demo
    assert demo["environment"]["FLUX_SERVER_DEVICE"] == "cpu"
    assert demo["command"] == ["serve", "demo"]
    assert demo["profiles"] == ["demo"]


def test_the_cluster_is_a_head_without_a_gpu_and_two_workers_with_one_each() -> None:
    head, *workers = (service(name, RAY_AUTH_TOKEN="secret", FAL_KEY="alice:secret") for name in CLUSTER)
    assert "deploy" not in head
    settings = Settings.load(head["environment"], {"ray": "auto"})
    assert settings.keys == ("alice:secret",)
    assert head["command"][0].endswith('flux-server serve "$FLUX_MODEL" --ray auto')
    assert head["ports"] == service("flux")["ports"]
    devices = [worker["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for worker in workers]
    assert devices == [["0"], ["1"]]
    for it in (head, *workers):
        assert it["build"]["args"]["RAY"] == "1"
        assert (it["environment"]["RAY_AUTH_MODE"], it["environment"]["RAY_AUTH_TOKEN"]) == ("token", "secret")
        assert (it["read_only"], it["cap_drop"], it["restart"]) == (True, ["ALL"], "unless-stopped")
    # Neither its keys nor its data are a worker's business.
    assert all("FAL_KEY" not in it["environment"] and it["volumes"] == ["models:/models"] for it in workers)
    assert all(it["ports"] == [] for it in workers)
    assert 'ARG RAY=""' in DOCKERFILE


def test_the_manifest_for_kubernetes_serves_and_grows() -> None:
    *claims, cluster = yaml.safe_load_all(KUBERAY.read_text(encoding="utf-8"))
    spec = cluster["spec"]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
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
def test_the_pages_on_deploying_name_what_there_is(name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    variables = set(re.findall(r"\b(?:FLUX|TORCH|HF|FAL)_[A-Z_]*[A-Z]\b", page))
    told = {name for name in variables if not name.startswith(PREFIX)}
    # Of libraries and of clients.
    assert told - {"HF_HOME", "HF_HUB_OFFLINE", "FAL_RUN_HOST", "FAL_QUEUE_RUN_HOST"} <= set(
        re.findall(r"\$\{(\w+)", COMPOSE.read_text(encoding="utf-8"))
    )
    assert {name.removeprefix(PREFIX).lower() for name in variables - told} <= set(Settings.model_fields)


@pytest.mark.container
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("buildah"), reason="needs root, buildah and debootstrap")
def test_the_image_is_built_and_paints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.jpg"
    process = subprocess.Popen([SCRIPT, picture], stdout=sys.stderr)
    try:
        assert process.wait(3500) == 0, capfd.readouterr().err
    finally:
        # It takes all with it that it has started.
        process.terminate()
        process.wait()
    with Image.open(picture) as painted:
        assert (painted.size, painted.format) == ((512, 512), "JPEG")
    with capfd.disabled():
        print(f"\n{capfd.readouterr().err}", end="")
