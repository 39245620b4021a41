"""Runs of several versions of fal-client with the variables of `flux-server env`, and a record of the hosts used."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.python_client import env_variables
from tests.support.server_process import ROOT, Server

TESTS = Path(__file__).parent
#: The directory of older clients, with a subdirectory for each.
CLIENTS = TESTS / ".clients"
#: Versions of fal-client. The first one is installed in this environment.
VERSIONS = ("1.0.3", "0.7.0", "0.5.9")


def client_directory(version: str) -> Path | None:
    """Return the directory of this older client, downloaded by pip the first time; None for the installed version."""
    return None if version == VERSIONS[0] else download_package("fal-client", version, "--no-deps")


def download_package(package: str, version: str, *options: str) -> Path:
    """Return a directory with this package, downloaded by pip the first time."""
    directory = CLIENTS / f"{package}-{version}"
    if not directory.is_dir():
        temp_path = CLIENTS / f"{directory.name}.part"
        shutil.rmtree(temp_path, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", *options, "--target", str(temp_path)]
        process = subprocess.run([*pip, f"{package}=={version}"], capture_output=True, text=True, timeout=300)
        if process.returncode:
            pytest.fail(f"pip could not download {package} {version}, which this test needs:\n{process.stderr}")
        temp_path.rename(directory)
    return directory


def run_client(server: Server, version: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a call of fal_client_calls with this version of the client and the variables of `env`; return the process."""
    paths = [variables.pop("PYTHONPATH", None), client_directory(version)]
    python_path = os.pathsep.join(str(path) for path in paths if path)
    environment = {"PATH": os.environ["PATH"], **env_variables(server), "PYTHONPATH": python_path, **variables}
    command = [sys.executable, "-m", "tests.support.fal_client_calls", *arguments]
    process = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=100)
    assert process.returncode == 0, process.stderr
    return process


def client_output(server: Server, version: str, *arguments: str, **variables: str) -> Any:
    """Run a call as `run_client` does; return the JSON that it prints."""
    return json.loads(run_client(server, version, *arguments, **variables).stdout)


def recording_environment(log: Path) -> dict[str, str]:
    """Return variables that make a Python or Node program record each lookup and connection in the file `log`."""
    canary = TESTS / "js" / "canary.cjs"
    return {"CANARY": str(log), "PYTHONPATH": str(TESTS / "canary"), "NODE_OPTIONS": f"--require {canary}"}


def recorded_hosts(log: Path) -> set[str]:
    """Return the names and addresses recorded in the file."""
    return set(log.read_text().split())
