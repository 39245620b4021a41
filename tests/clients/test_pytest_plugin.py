"""Tests of the pytest plugin for applications, each in a pytest process next to an application."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from pytest_httpserver import HTTPServer

from flux_server_testing.process import NotStarted, ServerProcess
from flux_server_testing.session import Options, Session
from tests.support.application_tests import INI, PROGRAM, Project
from tests.support.server_process import TEST_MODELS, free_port, serving, serving_with_proxy, wait_until
from tests.support.small_disk import small_disk


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Create an application."""
    return Project(tmp_path)


FIRST = """
import os, sys
from conftest import post
import pytest

import models, server

def test_the_applications_modules_are_its_own(fal_server):
    assert models.NAME == server.NAME == "mine"
    assert not [name for name in sys.modules if name.startswith(("server.", "models."))]

def test_faults_and_requests(fal_server):
    fal_server.plan_next(delay=0.01)
    assert post()["prompt"] == "a"
    assert [request.input["prompt"] for request in fal_server.requests] == ["a"]
    fal_server.fail_next(500, times=3)

def test_each_test_starts_afresh(fal_server):
    assert fal_server.requests == []
    assert post("a key of the application's own")["prompt"] == "a"
    assert len(fal_server.wait_for_requests()) == 1

def test_other_servers_are_reached(fal_server, httpserver):
    import httpx, requests
    httpserver.expect_request("/").respond_with_data("here")
    url = httpserver.url_for("/")
    assert [httpx.get(url).text, requests.get(url).text] == ["here", "here"]
    with httpx.Client(proxy=os.environ["HTTPS_PROXY"]) as client:
        assert client.get(url).text == "here"

def test_bad_faults_are_refused(fal_server):
    from flux_server_testing import ServerError
    with pytest.raises(ServerError, match="body.status: Input should be greater than or equal to 400"):
        fal_server.fail_next(200)
"""


def test_the_fixture(project: Project) -> None:
    output = project.run(FIRST)
    assert "5 passed" in output
    assert project.left() == []


RESTORED = """
import os
before = dict(os.environ)

def test_it(fal_server):
    assert os.environ["FAL_SERVER_URL"] == fal_server.url
    assert os.environ["OPENAI_BASE_URL"] == f"{fal_server.url}/v1"
    assert os.environ["FAL_KEY"] != before["FAL_KEY"]
"""


ENDING = """
import os

def pytest_unconfigure():
    print("afterwards", os.environ.get("FAL_KEY"), os.environ.get("FAL_SERVER_URL"))
"""


def test_the_environment_is_restored(project: Project) -> None:
    """Check the environment after the session's fixtures have ended, with a key that a developer has set."""
    project.write({"conftest.py": ENDING})
    assert "afterwards mine:secret None\n" in project.run(RESTORED, variables={"FAL_KEY": "mine:secret"})


def test_nothing_starts_until_the_fixture_is_used(project: Project) -> None:
    test = "import sys\ndef test_it():\n    assert 'flux_server_testing.session' not in sys.modules\n"
    variables = {"PATH": ""}
    project.write({"pytest.ini": INI.replace(PROGRAM, "/no/such/program")})
    assert "1 passed" in project.run(test, variables=variables)
    assert "1 passed" in project.run("def test_it(): pass", "-p", "no:flux_server_testing.plugin", "-o", "addopts=")


AT_START = """
import os
key = os.environ["FAL_KEY"]
from conftest import url

def test_it(fal_server):
    assert url == fal_server.url
"""


def test_the_server_can_start_before_the_applications_modules_are_imported(project: Project) -> None:
    project.write(
        {
            "pytest.ini": INI + "flux_server_at_start = true\n",
            "conftest.py": "import os\nurl = os.environ['FAL_SERVER_URL']\n",
        }
    )
    assert "1 passed" in project.run(AT_START)
    assert project.left() == []


PARALLEL = """
import os
import pytest
from conftest import post

@pytest.mark.parametrize("number", range(6))
def test_it(fal_server, number):
    fal_server.fail_next(500)
    with pytest.raises(OSError, match="500"):
        post()
    post()
    assert len(fal_server.requests) == 2
    with open(os.environ["NOTES"], "a") as notes:
        print(fal_server.url, os.environ["FAL_KEY"], file=notes)
"""


@pytest.mark.parametrize("at_start", ["true", "false"])
def test_parallel_workers_share_one_server(project: Project, tmp_path: Path, at_start: str) -> None:
    notes = tmp_path / "notes"
    project.write({"pytest.ini": f"{INI}flux_server_at_start = {at_start}\n"})
    options = ("-n", "2", "--dist", "each", "-W", "error")
    output = project.run(PARALLEL, *options, variables={"NOTES": str(notes)})
    assert "12 passed" in output
    urls, keys = zip(*(line.split() for line in notes.read_text().splitlines()), strict=True)
    assert len(set(urls)) == 1
    assert len(set(keys)) == 2
    # A server that the workers started ends after the process that runs them.
    wait_until(lambda: not project.left())


def test_nothing_is_left_if_the_tests_cannot_be_imported(project: Project) -> None:
    project.write({"pytest.ini": INI + "flux_server_at_start = true\n", "conftest.py": "raise RuntimeError('broken')"})
    assert "RuntimeError: broken" in project.run("", code=4)
    assert project.left() == []


WAITING = """
import signal, sys, time

def test_it(fal_server):
    # A shell starts a process in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("URL", fal_server.url, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_run_that_is_ended(project: Project, number: signal.Signals) -> None:
    project.write({"test_app.py": WAITING})
    with project.start() as process:
        assert process.stdout
        url = next(line for line in process.stdout if "URL" in line).split()[-1]
        assert url.startswith("http://127.0.0.1:")
        assert project.left()
        process.send_signal(number)
        process.wait()
        wait_until(lambda: not project.left())
        wait_until(lambda: not is_listening(url))


def is_listening(url: str) -> bool:
    """Return whether a server still listens at this URL."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_a_server_that_does_not_start_says_why(project: Project) -> None:
    project.write({"pytest.ini": INI.replace("--models-dir", "--max-running 0 --models-dir")})
    output = project.run("def test_it(fal_server): pass", code=1)
    assert "flux-server ended with exit code 2" in output
    assert "--max-running (FLUX_SERVER_MAX_RUNNING): Input should be greater than or equal to 1" in output


def test_a_worker_whose_parent_was_killed_starts_no_server(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", ""])
    parent.wait()
    with pytest.raises(NotStarted, match=f"--exit-with-process {parent.pid}: No such process"):
        Session(Options(program=PROGRAM.split()), worker="gw1", shared=tmp_path, parent=parent.pid)
    assert not (tmp_path / "flux-server.json").exists()


def test_a_missing_program(project: Project) -> None:
    project.write({"pytest.ini": INI.replace(PROGRAM, "/no/such/program")})
    output = project.run("def test_it(fal_server): pass", code=1)
    assert "flux-server could not be started: /no/such/program: No such file or directory" in output


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """Start servers for tests, one without keys and one with a fixed key; yield their URLs."""
    with (
        serving_with_proxy(tmp_path_factory.mktemp("open"), TEST_MODELS, testing="true") as without,
        serving_with_proxy(tmp_path_factory.mktemp("keys"), TEST_MODELS, testing="true", keys="ci:secret") as fixed,
    ):
        yield {"open": without.url, "keys": fixed.url}


USED = """
from conftest import post

def test_it(fal_server):
    post()
    assert len(fal_server.requests) == 1
    print("used", fal_server.url)
"""


def test_a_server_that_runs_already(project: Project, running: Mapping[str, str]) -> None:
    url = running["open"]
    for options, variables in [(["--flux-server-url", url], {}), ([], {"FAL_SERVER_URL": f"{url}/"})]:
        assert f"used {url}\n" in project.run(USED, *options, variables=variables)
    project.write({"pytest.ini": f"{INI}flux_server_url = {url}\n"})
    assert f"used {url}\n" in project.run(USED)


def test_a_running_server_with_a_fixed_key(project: Project, running: Mapping[str, str]) -> None:
    url = running["keys"]
    options = ("--flux-server-url", url)
    assert f"used {url}\n" in project.run(USED, *options, variables={"FAL_KEY": "ci:secret"})
    assert "This server requires a valid key" in project.run(USED, *options, code=1)
    output = project.run(USED, *options, "-n", "2", variables={"FAL_KEY": "ci:secret"}, code=1)
    assert "parallel workers need a server that accepts any key" in output


def test_a_wrong_url_gets_no_key(project: Project, httpserver: HTTPServer) -> None:
    options = ("--flux-server-url", httpserver.url_for(""))
    assert "refuses GET /testing/environment" in project.run(USED, *options, variables={"FAL_KEY": "a:b"}, code=1)
    assert [request.headers.get("authorization") for request, _ in httpserver.log] == [None]


def test_a_server_that_does_not_stop_is_killed_with_its_processes(
    httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a program that starts the server as another process, as uvx does."""
    httpserver.expect_request("/health/ready").respond_with_data("")
    monkeypatch.setattr("flux_server_testing.process._STOP_SECONDS", 0.1)
    script = f"trap '' TERM; sleep 600 & echo listens on {httpserver.url_for('')}; while true; do wait; done"
    before = set(psutil.Process().children())
    server = ServerProcess(["sh", "-c", script])
    (program,) = set(psutil.Process().children()) - before
    started = program.children()
    assert started
    server.stop()
    assert psutil.wait_procs(started, 30)[1] == []


CONTAINER = """
import os, ssl

def test_it(fal_server):
    assert "HTTPS_PROXY" not in os.environ
    ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
    import fal_client
    assert fal_client.run("test/null", arguments={"prompt": "a"})["prompt"] == "a"
    assert len(fal_server.requests) == 1
"""


def test_a_server_in_a_container(project: Project, tmp_path: Path) -> None:
    """Check a server that others can reach, whose files are not visible here. Uploads still go to fal then."""
    settings = {"testing": "true", "host": "0.0.0.0", "keys": "ci:secret", "tls_port": str(free_port())}
    with (
        small_disk(tmp_path / "disk", 64 * 2**20) as disk,
        serving(disk.inner_path / "data", TEST_MODELS, within=disk.enter_command, **settings) as server,
    ):
        url = server.ready().url.replace("0.0.0.0", "127.0.0.1")
        output = project.run(CONTAINER, "--flux-server-url", url, variables={"FAL_KEY": "ci:secret"})
    assert "1 passed" in output
    assert project.left() == []
