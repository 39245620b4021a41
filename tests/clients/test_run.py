"""Tests of `flux-server run`: unmodified Python and Node programs use this server."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from server.net.fal_hosts import DOMAINS
from tests.support.connect_clients import recorded_hosts, recording_environment
from tests.support.node import JS
from tests.support.python_client import download_image
from tests.support.server_process import ROOT, TEST_MODELS, Server, free_port, serving_with_proxy

SDKS = ["@fal-ai/client", "@fal-ai/serverless-client"]
CALLS = [sys.executable, "-m", "tests.support.fal_client_calls"]
TITLE_OPTION = {"NODE_OPTIONS": "--title=painter"}
NO_VARIABLES: Mapping[str, str] = {}


def run_under_flux_server(
    server: Server,
    command: Sequence[str],
    outside: Mapping[str, str] = NO_VARIABLES,
    *,
    cwd: Path = ROOT,
    options: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a command under `flux-server run` with only PATH, PYTHONPATH, this server's settings and `outside` set."""
    settings = {f"FLUX_SERVER_{name}": value for name, value in server.settings.items()}
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **settings, **outside}
    line = [sys.executable, "-m", "server", "run", *options, "--", *command]
    return subprocess.run(line, cwd=cwd, env=environment, text=True, capture_output=True, timeout=100)


def json_output(process: subprocess.CompletedProcess[str]) -> Any:
    """Check that the program succeeded; return the JSON in the last line of its output."""
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture
def small_image(tmp_path: Path) -> Path:
    """Create an image to upload; return its path."""
    Image.new("RGB", (8, 8), (200, 30, 30)).save(tmp_path / "small.png")
    return tmp_path / "small.png"


def test_a_python_program(proxy_server: Server) -> None:
    process = run_under_flux_server(proxy_server, [*CALLS, "everyday"])
    results = json_output(process)
    assert len({download_image(results[call]) for call in ("run", "submit", "subscribe", "result")}) == 1
    assert len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [[sys.executable, "-c", "print(1)"], ["sh", "-c", "echo 1"]], ids=["python", "sh"])
def test_a_program_that_needs_the_connect_proxy_is_not_started_without_it(server: Server, command: list[str]) -> None:
    options = ["--tls-port", server.tls_host.rpartition(":")[2]]
    process = run_under_flux_server(server, command, options=options)
    assert (process.returncode, process.stdout) == (1, "")
    assert "run needs the server's --proxy-port for all programs except Node" in process.stderr


def test_a_server_started_by_the_program_accepts_the_environment(proxy_server: Server) -> None:
    """Check that a server does not read the variables that `run` sets for the preload as settings."""
    program = [sys.executable, "-m", "server", "env"]
    process = run_under_flux_server(proxy_server, program)
    assert process.returncode == 0, process.stderr
    assert "export FAL_KEY" in process.stdout


def test_outer_proxy_variables_are_overridden(proxy_server: Server) -> None:
    proxy = f"http://127.0.0.1:{free_port()}"
    variables = {"HTTPS_PROXY": proxy, "https_proxy": proxy, "ALL_PROXY": proxy, "NO_PROXY": "*", "no_proxy": "fal.run"}
    assert (
        json_output(run_under_flux_server(proxy_server, [*CALLS, "hello", "test/null"], variables))["prompt"] == "hello"
    )


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"])
def test_fal_hosts_bypass_an_outer_proxy(node: None, server: Server, name: str) -> None:
    options = ["--tls-port", server.tls_host.rpartition(":")[2]]
    variables = {name: "http://127.0.0.2:9", "NO_PROXY": "intranet"}
    printed = json_output(
        run_under_flux_server(
            server, ["node", "-p", "JSON.stringify(process.env.NO_PROXY.split(','))"], variables, options=options
        )
    )
    assert {"intranet", "127.0.0.1", *DOMAINS, *(f".{domain}" for domain in DOMAINS)} <= set(printed)


def test_the_programs_own_key_is_kept(tmp_path: Path) -> None:
    with serving_with_proxy(tmp_path, TEST_MODELS, keys="alice:secret") as server:
        assert json_output(run_under_flux_server(server, [*CALLS, "hello", "test/null"]))["prompt"] == "hello"
        assert (
            json_output(run_under_flux_server(server, [*CALLS, "hello", "test/null"], {"FAL_KEY": "mallory:secret"}))[
                "status_code"
            ]
            == 401
        )


@pytest.mark.parametrize("sdk", SDKS)
def test_a_node_program(node: None, proxy_server: Server, small_image: Path, sdk: str) -> None:
    process = run_under_flux_server(proxy_server, ["node", "user_program.mjs", str(small_image)], {"SDK": sdk}, cwd=JS)
    results = json_output(process)
    assert len({download_image(results[call]) for call in ("run", "subscribe", "queued", "streamed", "realtime")}) == 1
    assert httpx.get(results["upload"], trust_env=False).content == small_image.read_bytes()
    assert process.stderr.count("flux-server:") == 1


@pytest.mark.parametrize("host", ["fal.run", "v3.fal.media", "v3b.fal.media", "queue.fal.run"])
def test_every_way_to_connect_reaches_this_server(node: None, proxy_server: Server, host: str) -> None:
    results = json_output(run_under_flux_server(proxy_server, ["node", "connections.mjs", host], cwd=JS))
    assert not {way: result for way, result in results.items() if "failed" in result}
    assert {result["status"] for result in results.values() if "status" in result} == {200}
    ports = {result["remotePort"] for result in results.values() if "remotePort" in result}
    assert ports == {int(proxy_server.settings["TLS_PORT"])}
    assert {result["issuer"] for result in results.values() if "issuer" in result} == {"flux-server local authority"}


TLS_CALLS = """
const tls = require("node:tls");
const port = Number(process.argv[1]);
const options = { host: "127.0.0.1", rejectUnauthorized: false };
const ways = [
  () => tls.connect({ ...options, port }),
  () => tls.connect(port, "127.0.0.1", options),
  () => tls.connect(port, options),
  () => tls.connect(port, options, () => {}),
];
(async () => {
  for (const way of ways) {
    await new Promise((resolve, reject) => {
      const socket = way().once("error", reject).once("secureConnect", () => (socket.destroy(), resolve()));
    });
  }
  console.log(JSON.stringify("reached"));
})();
"""


def test_connections_to_other_hosts_are_not_redirected(node: None, proxy_server: Server, server: Server) -> None:
    port = server.tls_host.rpartition(":")[2]
    assert json_output(run_under_flux_server(proxy_server, ["node", "-e", TLS_CALLS, port])) == "reached"


def test_the_preload_receives_every_domain(node: None, proxy_server: Server) -> None:
    printed = json_output(
        run_under_flux_server(proxy_server, ["node", "-p", "JSON.stringify(process.env.FLUX_RUN_TARGET.split(','))"])
    )
    assert printed == ["127.0.0.1", proxy_server.settings["PORT"], proxy_server.settings["TLS_PORT"], *DOMAINS]


def test_node_options_are_kept(node: None, proxy_server: Server) -> None:
    process = run_under_flux_server(
        proxy_server, ["node", "-p", "JSON.stringify(process.execArgv.concat(process.env.NODE_OPTIONS))"]
    )
    assert json_output(process)[-1].endswith('node_preload.cjs"')
    process = run_under_flux_server(
        proxy_server, ["node", "-p", "JSON.stringify([process.title, require('tls').connect.name])"], TITLE_OPTION
    )
    assert json_output(process) == ["painter", ""]


@pytest.fixture(scope="module")
def stopped_server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Start a server with its CONNECT proxy, then stop it; return the stopped server."""
    with serving_with_proxy(tmp_path_factory.mktemp("stopped"), TEST_MODELS) as server:
        assert server.stop() == 0
    return server


@pytest.mark.parametrize("sdk", SDKS)
def test_node_reaches_nothing_when_the_server_is_stopped(
    node: None, stopped_server: Server, small_image: Path, tmp_path: Path, sdk: str
) -> None:
    log = tmp_path / "notes"
    results = json_output(
        run_under_flux_server(
            stopped_server,
            ["node", "user_program.mjs", str(small_image)],
            {**recording_environment(log), "SDK": sdk},
            cwd=JS,
        )
    )
    assert [call for call, result in results.items() if not result.get("failed")] == []
    assert recorded_hosts(log) == {"127.0.0.1"}


def test_python_reaches_nothing_when_the_server_is_stopped(stopped_server: Server, tmp_path: Path) -> None:
    log = tmp_path / "notes"
    variables = recording_environment(log)
    variables["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    (tmp_path / "large.bin").write_bytes(b"x")
    assert (
        None
        not in json_output(
            run_under_flux_server(stopped_server, [*CALLS, "hopeless", str(tmp_path)], variables)
        ).values()
    )
    assert recorded_hosts(log) == {"127.0.0.1"}


def test_the_canary_records_connections_of_node(node: None, proxy_server: Server, tmp_path: Path) -> None:
    log = tmp_path / "notes"
    program = "fetch('http://127.0.0.2:10009').catch(() => fetch('http://no.such.host.invalid')).catch(() => 0)"
    assert run_under_flux_server(proxy_server, ["node", "-e", program], recording_environment(log)).returncode == 0
    assert {"127.0.0.2", "no.such.host.invalid"} <= recorded_hosts(log)


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_run_returns_the_commands_exit_code(proxy_server: Server, code: int) -> None:
    assert run_under_flux_server(proxy_server, [sys.executable, "-c", f"raise SystemExit({code})"]).returncode == code


def test_missing_command(proxy_server: Server) -> None:
    process = run_under_flux_server(proxy_server, ["python-that-is-not-there"])
    assert (process.returncode, process.stdout) == (127, "")
    assert "python-that-is-not-there: No such file or directory" in process.stderr


def test_no_command(proxy_server: Server) -> None:
    assert run_under_flux_server(proxy_server, []).returncode == 2


def test_bad_setting(proxy_server: Server) -> None:
    process = run_under_flux_server(proxy_server, [sys.executable, "-c", "print(1)"], {"FLUX_SERVER_TLS_PORT": "0"})
    assert (process.returncode, process.stdout) == (2, "")


def test_arguments_are_passed_through(proxy_server: Server) -> None:
    process = run_under_flux_server(
        proxy_server, [sys.executable, "-c", "import sys; print(sys.argv[1:])", "--help", "--port", "-x", ""]
    )
    assert process.stdout == "['--help', '--port', '-x', '']\n"


def test_run_prints_what_is_not_covered(node: None, proxy_server: Server) -> None:
    assert "run covers Python and Node" in run_under_flux_server(proxy_server, ["sh", "-c", "true"]).stderr
    assert "aiohttp without trust_env=True" in run_under_flux_server(proxy_server, [sys.executable, "-c", ""]).stderr
    assert "programs in other languages" in run_under_flux_server(proxy_server, ["node", "-e", ""]).stderr
