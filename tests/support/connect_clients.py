"""fal-client of every age in the variables that `flux-server env` prints, and what it turns to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.test_python_client import exports
from tests.support.server_process import ROOT, Server

TESTS = Path(__file__).parent
#: Where older clients are kept, one folder each.
CLIENTS = TESTS / ".clients"
#: The first is the one that is installed beside the server.
VERSIONS = ("1.0.3", "0.7.0", "0.5.9")


def folder_of(version: str) -> Path | None:
    """Where this older client is, fetched by pip the first time; None for the one that is installed anyway."""
    return None if version == VERSIONS[0] else fetched("fal-client", version, "--no-deps")


def fetched(package: str, version: str, *options: str) -> Path:
    """A folder with this package, fetched by pip the first time."""
    folder = CLIENTS / f"{package}-{version}"
    if not folder.is_dir():
        aside = CLIENTS / f"{folder.name}.part"
        shutil.rmtree(aside, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", *options, "--target", str(aside)]
        done = subprocess.run([*pip, f"{package}=={version}"], capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.fail(f"pip could not fetch {package} {version}, which this test drives:\n{done.stderr}")
        aside.rename(folder)
    return folder


def finished(server: Server, version: str, *arguments: str, **other: str) -> subprocess.CompletedProcess[str]:
    """A program of fal_client_calls, run with the printed variables and its version of the client alone."""
    paths = [other.pop("PYTHONPATH", None), folder_of(version)]
    python_path = os.pathsep.join(str(path) for path in paths if path)
    environment = {"PATH": os.environ["PATH"], **exports(server), "PYTHONPATH": python_path, **other}
    command = [sys.executable, "-m", "tests.support.fal_client_calls", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done


def said(server: Server, version: str, *arguments: str, **other: str) -> Any:
    """What such a program prints."""
    return json.loads(finished(server, version, *arguments, **other).stdout)


def watched(notes: Path) -> dict[str, str]:
    """The variables of a program whose every lookup and connection is noted."""
    canary = TESTS / "js" / "canary.cjs"
    return {"CANARY": str(notes), "PYTHONPATH": str(TESTS / "canary"), "NODE_OPTIONS": f"--require {canary}"}


def reached(notes: Path) -> set[str]:
    """The names and addresses that it noted."""
    return set(notes.read_text().split())
