"""fal-client, run in programs of its own and configured only with the variables that `flux-server env` prints."""

import json
import os
import shlex
import subprocess
import sys
from functools import cache
from typing import Any

import httpx

from tests.support.forking import run_flux_server
from tests.support.server_process import ROOT, Server


@cache
def env_variables(server: Server) -> dict[str, str]:
    """Run `flux-server env` and return its variables, parsed as a shell parses them."""
    process = run_flux_server("env", environment=server.environment())
    process.check_returncode()
    tokens = shlex.split(process.stdout, comments=True)
    return dict(token.split("=", 1) for token in tokens if token != "export")


def run_client(server: Server, *arguments: str, seconds: float = 60, **variables: str) -> Any:
    """Run a fal-client program with PATH, the variables of `flux-server env` and these variables; return its output.

    It may run for this many seconds.
    """
    environment = {"PATH": os.environ["PATH"], **env_variables(server), **variables}
    command = [sys.executable, "-m", "tests.support.fal_client_calls", *arguments]
    process = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=seconds)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def download_image(answer: dict[str, Any]) -> bytes:
    """Download the first image of an answer and return its bytes."""
    response = httpx.get(answer["images"][0]["url"], verify=False, trust_env=False)
    assert response.status_code == 200
    return response.content
