"""Tests of `flux-server run --testing`, which starts a server for the tests of an application."""

import subprocess
import sys
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer

from tests.support.application_tests import PROGRAM, Project
from tests.support.server_process import ROOT, TEST_MODELS


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Create an application."""
    return Project(tmp_path)


WITHIN = """
from conftest import post

import models, server

def test_it(fal_server):
    post()
    assert len(fal_server.requests) == 1
    assert models.NAME == server.NAME == "mine"
"""


def run_testing(project: Project, *line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `run --testing` with these options and this command in the application, with test models."""
    model = f"import sys\nsys.path.append({str(ROOT)!r})\nfrom tests.support.models import null\nMODEL = null.MODEL\n"
    project.write({"fal/null.py": model})
    command = [*PROGRAM.split(" "), "run", "--testing", "--models-dir", "fal", *line]
    environment = {**project.environment(), "FLUX_SERVER_WEIGHTS": TEST_MODELS, "PYTHONSAFEPATH": "1", **variables}
    return subprocess.run(command, cwd=project.directory, env=environment, capture_output=True, text=True, timeout=110)


def test_an_environment_without_the_plugin_gets_it_from_run(project: Project) -> None:
    """Check `flux-server run --testing -- pytest`, with a pytest that loads no plugin of its environment."""
    project.write({"pytest.ini": "[pytest]\npythonpath = .\n", "test_app.py": WITHIN})
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    done = run_testing(project, "--", *pytest, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0
    assert project.left() == []


#: A program that prints the command of the server, a child of the process that runs this program, and kills it.
KILLING = """
import os, psutil, select
server = psutil.Process(os.getppid()).children()[0]
print(server.cmdline(), os.environ["FAL_KEY"])
server.kill()
select.select([os.pidfd_open(server.pid)], [], [])
"""


def test_run_shows_no_secrets_but_the_servers_end(project: Project) -> None:
    done = run_testing(project, "--", sys.executable, "-c", KILLING, FLUX_SERVER_KEYS="ci:secret")
    command, _, key = done.stdout.rpartition(" ")
    assert "--exit-with-process" in command, done.stderr
    assert (key, "secret" in command) == ("ci:secret\n", False)
    assert "the server ended early. Its last lines:\n" in done.stderr
    assert "listens on http://127.0.0.1:" in done.stderr


def test_run_leaves_nothing_in_the_users_data_directory(project: Project, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    assert run_testing(project, "--data-dir", str(data_dir), "--", sys.executable, "-c", "").returncode == 0
    assert [path for path in data_dir.iterdir() if "pytest" in path.name] == []


def test_run_needs_a_tls_port_before_it_starts_a_server(project: Project, httpserver: HTTPServer) -> None:
    done = run_testing(project, "--tls-port", "0", "--port", str(httpserver.port), "--", "true")
    assert done.stderr.splitlines()[-1].startswith("run needs --tls-port")
