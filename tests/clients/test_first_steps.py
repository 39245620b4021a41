"""The five lines that say where to go once the server listens: each of them is followed as printed."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from server.cli.first_steps import first_steps
from server.settings import Settings
from tests.support.node import JS
from tests.support.server_process import MODELS, ROOT, TEST_MODELS, Server, free_port, serving

STEPS = ["Playground", "curl", "Python", "JavaScript", "OpenAI"]
PYTHON_PROGRAM = """
import fal_client
print(fal_client.run("test/null", arguments={"prompt": "from Python"})["prompt"])
"""
NODE_PROGRAM = """
import { fal } from "@fal-ai/client";
%s;
console.log((await fal.run("test/null", { input: { prompt: "from Node" } })).data.prompt);
"""


@dataclass(frozen=True)
class Started:
    """A server, the steps that it printed, by their names, and the environment of a terminal where a person types."""

    server: Server
    steps: Mapping[str, str]
    environment: Mapping[str, str]

    def output_of(self, *command: str, program: str = "", directory: Path = ROOT) -> str:
        """Run a command in another terminal; return its output, and fail if the command fails."""
        process = subprocess.run(
            command, env=self.environment, cwd=directory, input=program, capture_output=True, text=True, timeout=60
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout.strip()


@pytest.fixture(scope="module", params=["", "alice:secret"], ids=["without keys", "with a key"])
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """Start a server that offers only test/null, with and without a key."""
    models = tmp_path_factory.mktemp("models")
    shutil.copy(MODELS / "null.py", models)
    key: str = request.param
    settings = {"keys": key, "models_dir": str(models), "tls_port": str(free_port())}
    with serving(tmp_path_factory.mktemp("a data directory"), TEST_MODELS, **settings) as server:
        server.ready().wait_for(r"  OpenAI .+\n")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FAL_", "FLUX_SERVER_"))}
        environment = {name: value for name, value in inherited.items() if not name.lower().endswith("_proxy")}
        environment |= {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        steps = dict(re.findall(rf"^  ({'|'.join(STEPS)}) +(.+)$", server.output, re.MULTILINE))
        assert list(steps) == STEPS
        assert not key or key not in server.output
        yield Started(server, steps, {**environment, "FAL_KEY": key} if key else environment)


def test_the_playground(started: Started) -> None:
    response = httpx.get(started.steps["Playground"], trust_env=False)
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")


def test_curl(started: Started) -> None:
    response = json.loads(started.output_of("bash", "-c", f"{started.steps['curl']} --silent"))
    assert (response["prompt"], len(response["images"])) == ("a red apple", 1)


def test_python(started: Started) -> None:
    command, program = started.steps["Python"].partition("#")[0], shutil.which("python", path=f"{sys.prefix}/bin")
    assert started.output_of("bash", "-ec", f"{command}\n{program} -", program=PYTHON_PROGRAM) == "from Python"


@pytest.mark.skipif(not (JS / "node_modules" / "@fal-ai").is_dir(), reason="needs Node; `make test` installs the SDKs")
def test_javascript(started: Started) -> None:
    program = NODE_PROGRAM % started.steps["JavaScript"]
    assert started.output_of("node", "--input-type=module", program=program, directory=JS) == "from Node"


def test_openai(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    if "FAL_KEY" in started.environment:
        monkeypatch.setenv("FAL_KEY", started.environment["FAL_KEY"])
    for name in (name for name in os.environ if name.lower().endswith("_proxy")):
        monkeypatch.delenv(name)
    with eval(started.steps["OpenAI"], {"openai": openai, "os": os}) as client:
        assert "/files/" in client.images.generate(prompt="from OpenAI's package", size="64x64").data[0].url


def test_the_steps_follow_the_settings() -> None:
    options = {"host": "0.0.0.0", "port": 9000, "tls_port": 0, "data_dir": "/srv/flux"}
    local = first_steps(Settings.load({}, options), "fal-ai/flux/dev", needs_key=True)
    assert local.count("http://localhost:9000") == 4
    assert "fal_client requires HTTPS" in local
    public = first_steps(Settings.load({}, {"public_url": "https://flux.example.com"}), "", needs_key=True)
    assert public.count("https://flux.example.com") == 5
    assert "curl https://flux.example.com/openapi.json\n" in public
    # The variables of `env` contain no key, so the line for Python is the same with and without keys.
    assert 'env --public-url https://flux.example.com)"' in public


def test_json_logs_hold_no_steps(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS, log_format="json") as server:
        assert httpx.get(server.ready().url, trust_env=False).is_success
        server.stop()
        server.reader.join()
    assert "flux-server listens on" in " ".join(json.loads(line)["message"] for line in server.lines)
