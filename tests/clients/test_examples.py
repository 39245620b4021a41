"""The example applications: their tests pass, and without the handling of a fault, exactly the fault's test fails.

`tests/project/test_commands.py` runs the unchanged tests of the Node application.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flux_server_testing import FalServer
from flux_server_testing.process import ServerProcess
from tests.support.node import JS
from tests.support.server_process import ROOT

#: Each test starts a server and a test run, and takes minutes on a machine that is busy.
pytestmark = pytest.mark.timeout(300)
EXAMPLES = ROOT / "examples"
PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:schemathesis",
    "-p",
    "no:hypothesispytest",
]
#: Each test of the Python application, with the handling that it needs and what replaces this handling.
PYTHON = {
    "test_an_invalid_prompt": ("if error.status_code == 422:", "if False:"),
    "test_an_unsafe_image": ('if any(result["has_nsfw_concepts"]):', "if False:"),
    "test_an_error_of_the_server": ("if error.status_code != 500:", "if True:"),
    "test_a_timeout": ("if error.status_code == 504:", "if False:"),
    "test_a_cancelled_request": ("if error.status_code == 499:", "if False:"),
    "test_a_slow_sticker_is_cancelled": ("            handle.cancel()\n", ""),
    "test_a_limit_is_respected": ("except RateLimitError", "except ZeroDivisionError"),
    "test_the_place_in_the_queue": ("isinstance(status, fal_client.Queued)", "False"),
    "test_a_webhook_that_comes_twice": ('    if found.status != "waiting":\n        return\n', ""),
    "test_a_webhook_that_comes_late": ('if found.status == "waiting" and', "if False and"),
}
#: The same for the Node application.
NODE = {
    "an invalid prompt": ("if (error.status === 422)", "if (false)"),
    "an unsafe image": ("if (result.data.has_nsfw_concepts.includes(true))", "if (false)"),
    "an error of the server": ("if (error.status !== 500) throw error;", "throw error;"),
    "a timeout": ("if (error.status === 504)", "if (false)"),
    "a cancelled request": ("if (error.status === 499)", "if (false)"),
    "a slow sticker is cancelled": ("      await fal.queue.cancel(ENDPOINT, { requestId });\n", ""),
    "a limit is respected": ("if (response.status !== 429)", "if (true)"),
    "the place in the queue": ('status.status === "IN_QUEUE"', "false"),
    "a webhook that comes twice": ('  if (found.status !== "waiting") return;\n', ""),
    "a webhook that comes late": ('if (found.status === "waiting" &&', "if (false &&"),
}


def copied(name: str, directory: Path, change: tuple[str, str] = ("", "")) -> Path:
    """Copy an example into the directory, with one change to its stickers module; return the copy."""
    copy = shutil.copytree(
        EXAMPLES / name, directory / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules")
    )
    (module,) = copy.glob("stickers.*")
    text, (old, new) = module.read_text(), change
    assert not old or text.count(old) == 1
    module.write_text(text.replace(old, new) if old else text)
    if name == "node-app":
        (copy / "node_modules").symlink_to(JS / "node_modules")
    return copy


def environment(directory: Path) -> dict[str, str]:
    """Return this process's environment without its settings and keys, with a directory for temporary files."""
    kept = {name: value for name, value in os.environ.items() if not re.match("FAL_|FLUX_|OPENAI_|PYTEST|PYTHON", name)}
    (directory / "tmp").mkdir()
    return {**kept, "TMPDIR": str(directory / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}


def is_clean(directory: Path) -> bool:
    """Return whether no temporary files are left, apart from pytest's own."""
    return all(path.name.startswith("pytest-of-") for path in (directory / "tmp").iterdir())


def pytest_output(app: Path, variables: dict[str, str]) -> str:
    """Run the tests of a copy of the Python application; return pytest's output."""
    done = subprocess.run(PYTEST, cwd=app, env=variables, capture_output=True, text=True, timeout=280)
    return done.stdout + done.stderr


def test_the_python_example(tmp_path: Path) -> None:
    output = pytest_output(copied("python-app", tmp_path), environment(tmp_path))
    assert f" {len(PYTHON) + 1} passed" in output, output
    assert is_clean(tmp_path)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[FalServer]:
    """Start one server for the tests of all changed applications."""
    process = ServerProcess([sys.executable, "-P", "-m", "server"])
    yield FalServer(process.url)
    process.stop()


@pytest.mark.thorough
@pytest.mark.parametrize("test", PYTHON)
def test_each_python_test_needs_its_handling(shared_server: FalServer, tmp_path: Path, test: str) -> None:
    app = copied("python-app", tmp_path, PYTHON[test])
    output = pytest_output(app, {**environment(tmp_path), "FAL_SERVER_URL": shared_server.url})
    assert re.findall(r"^FAILED \S+::(\w+)", output, re.MULTILINE) == [test], output
    assert f"1 failed, {len(PYTHON)} passed" in output


@pytest.mark.thorough
@pytest.mark.parametrize("test", NODE)
def test_each_node_test_needs_its_handling(node: None, shared_server: FalServer, tmp_path: Path, test: str) -> None:
    app, found = copied("node-app", tmp_path, NODE[test]), shared_server.call("GET", "/testing/environment")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in found["settings"].items() if value]
    command = [sys.executable, "-P", "-m", "server", "run", *options, "--", "node", "--test", "test/"]
    variables = {**environment(tmp_path), **found["variables"]}
    done = subprocess.run(command, cwd=app, env=variables, capture_output=True, text=True, timeout=280)
    assert re.findall(r"^not ok \d+ - (.+)$", done.stdout, re.MULTILINE) == [test], done.stdout + done.stderr
    assert f"# pass {len(NODE)}\n" in done.stdout
