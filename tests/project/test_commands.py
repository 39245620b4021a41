"""The commands of the documents, taken from the pages and run by bash against real servers with the demo weights.

The comment before a block of commands names the test that runs the block; each test asks for the blocks that name it.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.clients.test_examples import NODE, copied, environment, is_clean
from tests.project.test_docs import DOCUMENTS
from tests.support.server_process import (
    ROOT,
    Server,
    free_port,
    open_gate,
    serving,
    wait_until_claimed,
    wait_until_completed,
)

BIN = f"{sys.prefix}/bin"
#: Words of the commands and their replacements. Tests also replace the server's address and words of their own.
REPLACED = {
    # Start without installing anything, because these tests already run in an installation.
    "make serve": f"make -f {ROOT}/Makefile -o .venv/serve.done BIN={BIN} serve",
    ".venv/bin/": f"{BIN}/",
    "/path/to/weights": f"{ROOT}/models/demo",
    "/path/to/directory": ".",
    "/backups/": "backup-of-",
    "/srv/flux": '"$FLUX_SERVER_DATA_DIR"',
}
PYTHON_PROGRAM = """
import fal_client
print(fal_client.run("test/null", arguments={"prompt": "from Python"})["prompt"])
"""
NODE_PROGRAM = """
const headers = { "content-type": "application/json" };
const request = { method: "POST", headers, body: JSON.stringify({ prompt: "from Node" }) };
console.log((await (await fetch("https://fal.run/test/null", request)).json()).prompt);
"""


def blocks(test: str, file: str = __file__) -> list[str]:
    """Return the blocks of commands, each one once, that the documents mark as run by this test of this file."""
    mark = re.escape(f"<!-- run by {Path(file).relative_to(ROOT)}::{test} -->\n```bash\n")
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    found = [block for text in texts for block in re.findall(f"^{mark}(.*?)^```$", text, re.DOTALL | re.MULTILINE)]
    assert found, f"no document has commands for {test}"
    return list(dict.fromkeys(found))


def replaced(commands: str, **others: str) -> str:
    """Replace the words of REPLACED, and those of `others`, in the commands."""
    for word, replacement in {**REPLACED, **others}.items():
        commands = commands.replace(word, replacement)
    return commands


def output_of(commands: str, server: Server, **others: str) -> str:
    """Run commands in the directory above the server's data; return their output, and fail if one of them fails."""
    commands = replaced(commands, **{"http://127.0.0.1:8000": server.url}, **others)
    # Leave out the proxy variables, because a proxy of this machine would get the calls to the server.
    environment = {name: value for name, value in server.environment().items() if not name.lower().endswith("_proxy")}
    environment |= {
        "PATH": f"{BIN}:{environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "FLUX_SERVER_PORT": server.url.rpartition(":")[2],
    }
    process = subprocess.run(
        ["bash", "-euc", commands],
        cwd=server.data_dir.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, f"{commands}\n{process.stdout}{process.stderr}"
    return process.stdout


@contextmanager
def started_by(command: str, directory: Path, **others: str) -> Iterator[Server]:
    """Run the server that this command starts in this directory, until the block ends."""
    # The test models import the package of the tests.
    script = f"export PATH={BIN}:$PATH PYTHONPATH={ROOT}; cd {directory}; exec {replaced(command, **others)}"
    # The script ignores the arguments that `serving` appends, because `command` starts the server in its own way.
    within = ("bash", "-euc", script)
    settings = {"tls_port": str(free_port()), "outbound_allow": "127.0.0.0/8"}
    with serving(directory / "data", within=within, **settings) as server:
        try:
            yield server.ready()
        finally:
            # Make passes SIGTERM on to the server; if make were killed, the server would keep running.
            server.stop()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start one server for most of the commands, by the first command of the README and of the quickstart."""
    (command,) = blocks("test_make_serve")
    with started_by(command, tmp_path_factory.mktemp("started")) as server:
        yield server


def test_make_serve(started: Server) -> None:
    assert httpx.get(f"{started.url}/health/ready", trust_env=False).is_success
    assert httpx.get(f"{started.url}/openapi.json", trust_env=False).json()["paths"].keys() >= {"/fal-ai/flux/dev"}


def test_upload(started: Server) -> None:
    file = started.data_dir.parent / "picture.png"
    Image.new("RGB", (8, 8), (200, 30, 30)).save(file)
    for block in blocks("test_upload"):
        url = json.loads(output_of(block, started))["access_url"]
        assert httpx.get(url, trust_env=False).content == file.read_bytes()


def test_python_with_variables(started: Server) -> None:
    # A test model, to save time: test_the_readme_command waits for an image of the demo in full size.
    for block in blocks("test_python_with_variables"):
        assert "/files/" in output_of(block, started, **{"fal-ai/flux/dev": "test/null"})


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node")
def test_whole_programs(tmp_path: Path) -> None:
    (tmp_path / "your_program.py").write_text(PYTHON_PROGRAM)
    (tmp_path / "your_program.mjs").write_text(NODE_PROGRAM)
    ports = {"8188": str(free_port())}
    for block in blocks("test_whole_programs"):
        command, _, programs = block.partition("\n")
        with started_by(command, tmp_path, **ports) as server:
            assert output_of(programs, server, **ports).splitlines() == ["from Python", "from Node"]


@pytest.mark.timeout(300)
def test_node_tests(node: None, tmp_path: Path) -> None:
    """Check that the Node example's tests pass with the command of the page, and that the server leaves nothing."""
    copied("node-app", tmp_path / "examples")
    variables, installed = environment(tmp_path), {"npm install": "true", f"../../{BIN}": BIN}
    for block in blocks("test_node_tests"):
        commands = replaced(block, **installed)
        done = subprocess.run(
            ["bash", "-euc", commands], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=280
        )
        assert f"# pass {len(NODE) + 1}\n# fail 0\n" in done.stdout, done.stdout + done.stderr
        assert is_clean(tmp_path)


def test_backup(started: Server) -> None:
    for block in blocks("test_backup"):
        assert " MB" in output_of(block, started)
    (copy,) = started.data_dir.parent.glob("backup-of-*")
    assert {"queue.sqlite3", "files", "tls"} <= {path.name for path in copy.iterdir()}


def test_keys(started: Server, tmp_path: Path) -> None:
    # Make the keys in another data directory, because the other tests send no keys to the server.
    with_directory = f"export FLUX_SERVER_DATA_DIR={tmp_path}\n"
    for block in blocks("test_keys"):
        *keys, shop, me, revoked = output_of(with_directory + block, started).splitlines()
        assert [shop.split("\t")[:2], me.split("\t")[:2]] == [["shop", "client"], ["me", "operator"]]
        assert (len(keys), revoked) == (2, "Revoked the key shop")


def test_requests(started: Server) -> None:
    with httpx.Client(base_url=started.url, trust_env=False) as client, open_gate(started.data_dir / "gate") as gate:
        request = client.post("/queue/test/gate", json={"prompt": str(gate.path), "num_inference_steps": 2}).json()
        wait_until_claimed(client, request["status_url"])
        for block in blocks("test_requests"):
            listed, cancelled = output_of(block, started, REQUEST_ID=request["request_id"]).splitlines()
            assert listed.startswith(request["request_id"])
            assert cancelled == f"{request['request_id']}: cancelled"


def test_webhooks(started: Server) -> None:
    with httpx.Client(base_url=started.url, trust_env=False) as client:
        # The URL is the server's own /health, which refuses the call, so the webhook still waits.
        hook = {"fal_webhook": f"{started.url}/health"}
        request = client.post("/queue/test/null", params=hook, json={"prompt": "x"}).json()
        wait_until_completed(client, request["status_url"])
    for block in blocks("test_webhooks"):
        listed = output_of(block, started, REQUEST_ID=request["request_id"])
        assert listed.startswith(request["request_id"])
        assert hook["fal_webhook"] in listed


def test_an_endpoint_on_your_weights(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "adding-an-endpoint.md").read_text(encoding="utf-8")
    (tmp_path / "portraits.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    request = {"prompt": "a cat", "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}
    for block in blocks("test_an_endpoint_on_your_weights"):
        with started_by(block, tmp_path) as server:
            response = httpx.post(f"{server.url}/acme/flux/portraits", json=request, timeout=60, trust_env=False)
            assert len(response.raise_for_status().json()["images"]) == 1
