"""An application whose tests run in a pytest process, with the plugin `flux_server_testing`."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.server_process import MODELS, ROOT, TEST_MODELS

#: An application with modules that have the names of the server's.
APPLICATION = {"models.py": "NAME = 'mine'", "server/__init__.py": "NAME = 'mine'"}
#: The test models import this directory's packages, and the plugin hands PYTHONPATH down to no server.
PROGRAM = f"env PYTHONPATH={ROOT} {sys.executable} -m server"
INI = f"""
[pytest]
pythonpath = .
flux_server_program = {PROGRAM}
flux_server_options = {TEST_MODELS} --models-dir {MODELS}
"""
#: Without plugins that are slow to import.
QUICKLY = ["-p", "no:cacheprovider", "-p", "no:schemathesis", "-p", "no:hypothesispytest"]
NO_VARIABLES: Mapping[str, str] = {}
BODY = '{"prompt": "a"}'
POST = f"""
import json, os, urllib.request
def post(key=None):
    headers = {{"authorization": f"Key {{key or os.environ['FAL_KEY']}}"}}
    url = os.environ["FAL_SERVER_URL"] + "/test/null"
    with urllib.request.urlopen(urllib.request.Request(url, b'{BODY}', headers)) as response:
        return json.load(response)
"""


class Project:
    """An application in a directory, with a directory for temporary files that must be empty in the end."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.temporary = directory / "app", directory / "tmp"
        self.temporary.mkdir()
        self.write({**APPLICATION, "pytest.ini": INI, "conftest.py": POST})

    def write(self, files: Mapping[str, str]) -> None:
        """Write files, by their path in the application."""
        for name, text in files.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def environment(self) -> dict[str, str]:
        """Return this process's environment without its own settings, with the directory for temporary files."""
        kept = {name: value for name, value in os.environ.items() if not re.match("FAL_|FLUX_|PYTEST|PYTHON", name)}
        return {**kept, "TMPDIR": str(self.temporary), "PYTHONDONTWRITEBYTECODE": "1"}

    def start(self, *options: str, variables: Mapping[str, str] = NO_VARIABLES) -> subprocess.Popen[str]:
        """Start pytest in the application."""
        command = [sys.executable, "-m", "pytest", *QUICKLY, "-rs", "-s", *options]
        return subprocess.Popen(
            command,
            cwd=self.directory,
            env={**self.environment(), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, test: str, *options: str, variables: Mapping[str, str] = NO_VARIABLES, code: int = 0) -> str:
        """Run one file of tests, whose exit code must be `code`; return the output."""
        self.write({"test_app.py": test})
        with self.start(*options, variables=variables) as process:
            output, _ = process.communicate(timeout=110)
        assert process.returncode == code, output
        return output

    def left(self) -> Sequence[str]:
        """Return what is left of temporary files, apart from pytest's own."""
        return [path.name for path in self.temporary.iterdir() if not path.name.startswith("pytest-of-")]
