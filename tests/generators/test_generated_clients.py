"""Clients generated from the OpenAPI documents of a running server, which generate images by run and by queue."""

import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import pytest

from models import discover
from models.loading.specs import assign_weights
from tests.support.node import JS
from tests.support.server_process import ROOT, Server, serving

pytestmark = [pytest.mark.generators, pytest.mark.timeout(900)]

FLUX = "fal-ai/flux/dev"
ENDPOINTS = sorted(assign_weights(["demo"], discover()))
KEY = "Key alice:secret"
PROGRAMS = ROOT / "tests" / "support" / "generators"
BIN = ROOT / "build" / "generators" / "bin"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server that requires a key, without the models of other tests. Requests wait until it has loaded."""
    data_dir = tmp_path_factory.mktemp("data")
    with serving(data_dir, keys=KEY.removeprefix("Key "), models_dir=str(tmp_path_factory.mktemp("none"))) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def generators(node: None) -> None:
    """Skip the tests if the generators are missing."""
    if not BIN.is_dir():
        pytest.skip("build/generators missing: run `make generators`, which installs the generators")


@pytest.fixture(scope="module")
def documents(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fetch the documents: whole.json, queue.json for flux/dev, and one file for each other endpoint."""
    directory = tmp_path_factory.mktemp("documents")
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        (directory / "whole.json").write_bytes(client.get("/openapi.json").raise_for_status().content)
        for endpoint in ENDPOINTS:
            answer = client.get("/api/openapi/queue/openapi.json", params={"endpoint_id": endpoint}).raise_for_status()
            name = "queue" if endpoint == FLUX else endpoint.replace("/", "_")
            (directory / f"{name}.json").write_bytes(answer.content)
    return directory


def call(command: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program, which must not fail."""
    path = f"{BIN}:{os.environ['PATH']}"
    environment = {"PATH": path, **options.pop("env", {})}
    done = subprocess.run(
        [str(each) for each in command], env=environment, capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"
    return done


def openapi_generator(*arguments: object) -> str:
    """Run openapi-generator; skip the test if Java is missing."""
    if not shutil.which("java"):
        pytest.skip("java missing: install a Java runtime, such as Debian's default-jre-headless")
    done = call([BIN / "openapi-generator-cli", *arguments], env={"JAVA_OPTS": "-Xmx1g"})
    assert "ERROR" not in done.stdout + done.stderr
    return done.stdout


def assert_client_works(server: Server, printed: str) -> None:
    """Check what a program printed: URLs of images, the lines of two logs, and the message of an error."""
    answer = json.loads(printed.splitlines()[-1])
    images = [answer["run"], answer["whole"][1], answer["queue"][1]]
    for url in images:
        content = httpx.get(url, timeout=60, trust_env=False).raise_for_status().content
        with PIL.Image.open(io.BytesIO(content)) as image:
            assert image.format == "JPEG"
    assert len(set(images)) == 3
    for logs, _ in answer["whole"], answer["queue"]:
        assert "step 1/1" in logs
    assert answer["problem"] == "Request not found"


@pytest.mark.parametrize("name", ["whole", "queue", *(each.replace("/", "_") for each in ENDPOINTS if each != FLUX)])
def test_openapi_generator_finds_nothing_to_recommend(documents: Path, name: str) -> None:
    output = openapi_generator("validate", "--recommend", "-i", documents / f"{name}.json")
    assert "No validation issues detected" in output


def test_the_commands_of_the_page(server: Server, tmp_path: Path) -> None:
    mark = "<!-- run by tests/generators/test_generated_clients.py::test_the_commands_of_the_page -->\n```bash\n"
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    commands = page.partition(mark)[2].partition("```")[0].replace("http://127.0.0.1:8000", server.url)
    # npx takes the package from here.
    (tmp_path / "node_modules").symlink_to(JS / "node_modules")
    call(["bash", "-euc", commands], cwd=tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"flux-python", "flux-typescript", "flux-server-client", "flux.d.ts"} <= written


def test_openapi_generator_for_python(server: Server, documents: Path, tmp_path: Path) -> None:
    for name in "whole", "queue":
        target = ["-g", "python", "-o", tmp_path, "--package-name", f"{name}_client"]
        openapi_generator("generate", "-i", documents / f"{name}.json", *target)
    command = [BIN / "python", PROGRAMS / "openapi_generator.py", server.url, KEY]
    assert_client_works(server, call(command, env={"PYTHONPATH": str(tmp_path)}).stdout)


def test_openapi_python_client(server: Server, documents: Path, tmp_path: Path) -> None:
    for name in "whole", "queue":
        document, target = documents / f"{name}.json", tmp_path / f"{name}_client"
        command = [BIN / "openapi-python-client", "generate", "--path", document, "--output-path", target]
        call([*command, "--meta", "none", "--fail-on-warning"])
    command = [BIN / "python", PROGRAMS / "openapi_python_client.py", server.url, KEY]
    assert_client_works(server, call(command, env={"PYTHONPATH": str(tmp_path)}).stdout)


def test_openapi_generator_for_typescript(server: Server, documents: Path, tmp_path: Path) -> None:
    for name in "whole", "queue":
        target = ["-g", "typescript-fetch", "-o", tmp_path / name]
        openapi_generator("generate", "-i", documents / f"{name}.json", *target)
    assert_client_works(server, run_typescript(tmp_path, "typescript_fetch.ts", server.url))


def test_openapi_typescript(server: Server, documents: Path, tmp_path: Path) -> None:
    for name in "whole", "queue":
        command = [JS / "node_modules" / ".bin" / "openapi-typescript", documents / f"{name}.json"]
        call([*command, "-o", tmp_path / f"{name}.d.ts", "--default-non-nullable=false"])
    assert_client_works(server, run_typescript(tmp_path, "openapi_fetch.ts", server.url))


def run_typescript(directory: Path, program: str, url: str) -> str:
    """Check the types of a program and of the generated code next to it, and run the program."""
    shutil.copy(JS / "generated" / program, directory / "program.ts")
    shutil.copy(JS / "generated" / "tsconfig.json", directory)
    (directory / "node_modules").symlink_to(JS / "node_modules")
    tools = JS / "node_modules" / ".bin"
    call([tools / "tsc", "-p", directory])
    bundle = ["--bundle", "--platform=node", "--format=esm", "--outfile=program.mjs"]
    call([tools / "esbuild", "program.ts", *bundle], cwd=directory)
    return call(["node", "program.mjs", url, KEY], cwd=directory).stdout
