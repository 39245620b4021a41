"""`flux-server run`: programs of Python and Node as their users wrote them, brought here."""

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
from tests.clients.test_node_clients import node as node
from tests.clients.test_python_client import picture
from tests.support.connect_clients import reached, watched
from tests.support.node import JS
from tests.support.server_process import ROOT, TEST_MODELS, Server, free_port, with_door

SDKS = ["@fal-ai/client", "@fal-ai/serverless-client"]
CALLS = [sys.executable, "-m", "tests.support.fal_client_calls"]
TITLE = {"NODE_OPTIONS": "--title=painter"}
NOTHING: Mapping[str, str] = {}


def ran(
    server: Server,
    command: Sequence[str],
    outside: Mapping[str, str] = NOTHING,
    *,
    cwd: Path = ROOT,
    options: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """What a command did inside `flux-server run`, with the settings of this server and no more than PATH."""
    settings = {f"FLUX_SERVER_{name}": value for name, value in server.settings.items()}
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **settings, **outside}
    line = [sys.executable, "-m", "server", "run", *options, "--", *command]
    return subprocess.run(line, cwd=cwd, env=environment, text=True, capture_output=True, timeout=100)


def said(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON in its last line."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A picture to upload."""
    Image.new("RGB", (8, 8), (200, 30, 30)).save(tmp_path / "small.png")
    return tmp_path / "small.png"


def test_a_python_program(door: Server) -> None:
    done = ran(door, [*CALLS, "everyday"])
    got = said(done)
    assert len({picture(got[way]) for way in ("run", "submit", "subscribe", "result")}) == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [[sys.executable, "-c", "print(1)"], ["sh", "-c", "echo 1"]], ids=["python", "sh"])
def test_a_program_that_would_reach_fal_without_a_door_is_not_started(server: Server, command: list[str]) -> None:
    options = ["--tls-port", server.tls_host.rpartition(":")[2]]
    done = ran(server, command, options=options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "run needs the server's --proxy-port for all programs except Node" in done.stderr


def test_a_server_that_a_program_starts_takes_its_settings(door: Server) -> None:
    """What `run` tells the preload is no setting."""
    program = [sys.executable, "-m", "server", "env"]
    done = ran(door, program)
    assert done.returncode == 0, done.stderr
    assert "export FAL_KEY" in done.stdout


def test_what_is_said_outside_does_not_lead_it_astray(door: Server) -> None:
    proxy = f"http://127.0.0.1:{free_port()}"
    outside = {"HTTPS_PROXY": proxy, "https_proxy": proxy, "ALL_PROXY": proxy, "NO_PROXY": "*", "no_proxy": "fal.run"}
    assert said(ran(door, [*CALLS, "hello", "test/null"], outside))["prompt"] == "hello"


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_outside_has_no_business_with_fals_names(node: None, server: Server, name: str) -> None:
    options = ["--tls-port", server.tls_host.rpartition(":")[2]]
    outside = {name: "http://127.0.0.2:9", "NO_PROXY": "intranet"}
    printed = said(
        ran(server, ["node", "-p", "JSON.stringify(process.env.NO_PROXY.split(','))"], outside, options=options)
    )
    assert {"intranet", "127.0.0.1", *DOMAINS, *(f".{domain}" for domain in DOMAINS)} <= set(printed)


def test_the_programs_own_key_is_kept(tmp_path: Path) -> None:
    with with_door(tmp_path, TEST_MODELS, keys="alice:secret") as server:
        assert said(ran(server, [*CALLS, "hello", "test/null"]))["prompt"] == "hello"
        assert said(ran(server, [*CALLS, "hello", "test/null"], {"FAL_KEY": "mallory:secret"}))["status_code"] == 401


@pytest.mark.parametrize("sdk", SDKS)
def test_a_node_program(node: None, door: Server, small: Path, sdk: str) -> None:
    done = ran(door, ["node", "whole.mjs", str(small)], {"SDK": sdk}, cwd=JS)
    got = said(done)
    assert len({picture(got[way]) for way in ("run", "subscribe", "queued", "streamed", "realtime")}) == 1
    assert httpx.get(got["upload"], trust_env=False).content == small.read_bytes()
    assert done.stderr.count("flux-server:") == 1


@pytest.mark.parametrize("host", ["fal.run", "v3.fal.media", "v3b.fal.media", "queue.fal.run"])
def test_every_way_to_connect_leads_here(node: None, door: Server, host: str) -> None:
    got = said(ran(door, ["node", "connections.mjs", host], cwd=JS))
    assert not {way: found for way, found in got.items() if "failed" in found}
    assert {found["status"] for found in got.values() if "status" in found} == {200}
    ports = {found["remotePort"] for found in got.values() if "remotePort" in found}
    assert ports == {int(door.settings["TLS_PORT"])}
    assert {found["issuer"] for found in got.values() if "issuer" in found} == {"flux-server local authority"}


OTHER = """
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


def test_other_hosts_are_left_alone(node: None, door: Server, server: Server) -> None:
    port = server.tls_host.rpartition(":")[2]
    assert said(ran(door, ["node", "-e", OTHER, port])) == "reached"


def test_the_preload_knows_every_domain(node: None, door: Server) -> None:
    printed = said(ran(door, ["node", "-p", "JSON.stringify(process.env.FLUX_RUN_TARGET.split(','))"]))
    assert printed == ["127.0.0.1", door.settings["PORT"], door.settings["TLS_PORT"], *DOMAINS]


def test_node_options_are_kept(node: None, door: Server) -> None:
    done = ran(door, ["node", "-p", "JSON.stringify(process.execArgv.concat(process.env.NODE_OPTIONS))"])
    assert said(done)[-1].endswith('node_preload.cjs"')
    done = ran(door, ["node", "-p", "JSON.stringify([process.title, require('tls').connect.name])"], TITLE)
    assert said(done) == ["painter", ""]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server that was there once."""
    with with_door(tmp_path_factory.mktemp("stopped"), TEST_MODELS) as server:
        assert server.stop() == 0
    return server


@pytest.mark.parametrize("sdk", SDKS)
def test_node_reaches_nothing_when_the_server_is_stopped(
    node: None, stopped: Server, small: Path, tmp_path: Path, sdk: str
) -> None:
    notes = tmp_path / "notes"
    got = said(ran(stopped, ["node", "whole.mjs", str(small)], {**watched(notes), "SDK": sdk}, cwd=JS))
    assert [way for way, found in got.items() if not found.get("failed")] == []
    assert reached(notes) == {"127.0.0.1"}


def test_python_reaches_nothing_when_the_server_is_stopped(stopped: Server, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    outside = watched(notes)
    outside["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    (tmp_path / "large.bin").write_bytes(b"x")
    assert None not in said(ran(stopped, [*CALLS, "hopeless", str(tmp_path)], outside)).values()
    assert reached(notes) == {"127.0.0.1"}


def test_the_canary_sees_node_too(node: None, door: Server, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    program = "fetch('http://127.0.0.2:10009').catch(() => fetch('http://no.such.host.invalid')).catch(() => 0)"
    assert ran(door, ["node", "-e", program], watched(notes)).returncode == 0
    assert {"127.0.0.2", "no.such.host.invalid"} <= reached(notes)


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_the_exit_code_is_the_commands(door: Server, code: int) -> None:
    assert ran(door, [sys.executable, "-c", f"raise SystemExit({code})"]).returncode == code


def test_a_command_that_is_not_there(door: Server) -> None:
    done = ran(door, ["python-that-is-not-there"])
    assert (done.returncode, done.stdout) == (127, "")
    assert "python-that-is-not-there: No such file or directory" in done.stderr


def test_no_command(door: Server) -> None:
    assert ran(door, []).returncode == 2


def test_a_bad_setting(door: Server) -> None:
    done = ran(door, [sys.executable, "-c", "print(1)"], {"FLUX_SERVER_TLS_PORT": "0"})
    assert (done.returncode, done.stdout) == (2, "")


def test_arguments_and_input_are_the_commands(door: Server) -> None:
    done = ran(door, [sys.executable, "-c", "import sys; print(sys.argv[1:])", "--help", "--port", "-x", ""])
    assert done.stdout == "['--help', '--port', '-x', '']\n"


def test_what_is_not_covered_is_said(node: None, door: Server) -> None:
    assert "run covers Python and Node" in ran(door, ["sh", "-c", "true"]).stderr
    assert "aiohttp without trust_env=True" in ran(door, [sys.executable, "-c", ""]).stderr
    assert "programs in other languages" in ran(door, ["node", "-e", ""]).stderr
