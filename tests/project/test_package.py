"""The wheel and the source distribution: their content, and with the marker `release` every way to install them."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest
from PIL import Image

from tests.project.test_commands import blocks
from tests.support.server_process import ROOT, Server, free_port, serving

CONFIGURED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = CONFIGURED["project"]["version"]
SETUPTOOLS = CONFIGURED["tool"]["setuptools"]
#: The directories and modules that the wheel installs.
INSTALLED = {name.partition(".")[0] for name in (*SETUPTOOLS["packages"], *SETUPTOOLS.get("py-modules", ()))}
#: Tracked files below them that are left out, because only the training and the evaluation of the demo use them.
LEFT_OUT = ("models/demo/judge/", "models/demo/recipe/")
MAX_BYTES = 25_000_000
#: Examples of every kind of file, so that a file that is not tracked is missed.
EXAMPLES = {
    *("models/py.typed", "models/flux_dev.py", "models/demo/transformer/diffusion_pytorch_model.safetensors"),
    *("server/py.typed", "server/cli/node_preload.cjs", "server/static/index.html", "server/storage/schema.sql"),
}
#: Seconds until an installation must have succeeded; PyTorch alone can be a download of 3 GB.
LIMIT = 1500


def tracked() -> list[str]:
    """Return the files that git tracks."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


@dataclass(frozen=True)
class Packages:
    """The two files of a release."""

    wheel: Path
    source: Path


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """Return the packages in the directory PACKAGES; without this variable, build them from the tracked files."""
    if "PACKAGES" in os.environ:
        directory = ROOT / os.environ["PACKAGES"]
    else:
        copy, directory = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
        for name in tracked():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(copy)]
        # Warnings of setuptools about this configuration fail the test too.
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not re.search(r"Warning:|WARNING ", done.stdout + done.stderr)
    return Packages(directory / f"flux_server-{VERSION}-py3-none-any.whl", directory / f"flux_server-{VERSION}.tar.gz")


def program() -> set[str]:
    """Return the files that both packages must contain, and nothing else but metadata."""
    names = {name for name in tracked() if name.partition("/")[0].removesuffix(".py") in INSTALLED}
    return {name for name in names if not name.startswith(LEFT_OUT)}


def test_the_wheel_holds_the_program_and_the_demo_weights_only(packages: Packages) -> None:
    with ZipFile(packages.wheel) as wheel:
        names, about = set(wheel.namelist()), f"flux_server-{VERSION}.dist-info"
        metadata = wheel.read(f"{about}/METADATA").decode()
    assert names >= EXAMPLES
    assert {name for name in names if not name.startswith(f"{about}/")} == program()
    assert {name.removeprefix(f"{about}/") for name in names - program()} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE", "licenses/NOTICE")
    }
    assert {"License-Expression: Apache-2.0", "Classifier: Typing :: Typed"} <= set(metadata.splitlines())


def test_the_source_distribution_holds_what_the_wheel_is_built_from(packages: Packages) -> None:
    with tarfile.open(packages.source) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    names = {name for name in files if not name.startswith("flux_server.egg-info/")}
    assert names >= EXAMPLES
    assert names - program() == {"LICENSE", "NOTICE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert program() <= names


def test_the_packages_are_small(packages: Packages) -> None:
    sizes = {path.name: path.stat().st_size for path in (packages.wheel, packages.source)}
    print(sizes)
    assert max(sizes.values()) <= MAX_BYTES


@pytest.fixture
def place(tmp_path: Path, packages: Packages) -> Iterator[Path]:
    """Create a home, and a directory with the packages and an application whose modules have the server's names."""
    home, elsewhere, programs = (tmp_path / name for name in ("home", "elsewhere", "programs"))
    for directory in (home, programs, elsewhere / "server"):
        directory.mkdir(parents=True)
    for name in ("models.py", "server/__init__.py"):
        (elsewhere / name).write_text("raise RuntimeError('this module belongs to the application')")
    for path in (packages.wheel, packages.source):
        shutil.copy(path, elsewhere)
    for name in ("uv", "uvx", "pipx"):
        (programs / name).symlink_to(f"{sys.prefix}/bin/{name}")
    (programs / "python3").symlink_to(f"{sys.base_prefix}/bin/python3")
    # The version of PyTorch that the tests run with. The other packages are the newest, as users get them.
    (requirement,) = re.findall(r"^torch==.*$", (ROOT / "constraints" / "cpu.txt").read_text(), re.MULTILINE)
    (tmp_path / "torch.txt").write_text(f"{requirement}\n")
    yield tmp_path
    # pytest keeps the directories of three runs, but an installation takes more than a GB.
    shutil.rmtree(tmp_path)


def terminal(place: Path) -> str:
    """Return commands that prepare a shell as on a machine without a clone, in the directory with the packages."""
    return "\n".join(
        (
            f"set -eu; cd {place}/elsewhere; unset PYTHONPATH VIRTUAL_ENV XDG_DATA_HOME",
            f"export HOME={place}/home PATH={place}/home/.local/bin:{place}/programs:/usr/local/bin:/usr/bin:/bin",
            f"export PIP_CONSTRAINT={place}/torch.txt UV_CONSTRAINT={place}/torch.txt",
            f"export UV_PYTHON={place}/programs/python3 PIPX_DEFAULT_PYTHON={place}/programs/python3",
            # uv does not read pip's variables.
            'export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"',
        )
    )


@contextmanager
def installed(test: str, place: Path) -> Iterator[Server]:
    """Run the commands of the quickstart that name this test, as in a terminal of a machine without a clone."""
    (block,) = blocks(test, __file__)
    *install, serve = block.replace("git+URL", f"git+file://{ROOT}").strip().splitlines()
    script = "\n".join((terminal(place), *install, f"exec {serve}"))
    settings = {"tls_port": str(free_port()), "models_dir": ""}
    with serving(place / "data", within=("bash", "-c", script), **settings) as server:
        try:
            yield server
        finally:
            # uvx passes SIGTERM on to the server; if uvx were killed, the server would keep running.
            server.stop()


def follow(test: str, place: Path) -> None:
    """Install and serve, generate an image from a prompt and one from an image, and print the times."""
    started = time.monotonic()
    with installed(test, place) as server:
        server.wait_for(r"listens on .*", LIMIT)
        times = [f"{test}: listens after {time.monotonic() - started:.0f} s"]
        server.wait_for(r"\[info\] ready ", LIMIT)
        with httpx.Client(base_url=server.url, timeout=LIMIT, trust_env=False) as client:
            assert "<html" in client.get("/").text
            request = {"prompt": "a dog on a blue background", "seed": 1}
            size, content = generate(client, "fal-ai/flux/dev", request)
            times.append(f"first image of 1024x768 after {time.monotonic() - started:.0f} s")
            assert size == (1024, 768)
            encoded = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
            request |= {"image_url": encoded, "num_inference_steps": 10}
            assert generate(client, "fal-ai/flux/dev/image-to-image", request)[0] == (1024, 768)
        (device,) = re.findall(r"computing in (.*) \[", server.output)
        print(", ".join((*times, device)))


def generate(client: httpx.Client, endpoint: str, request: dict[str, object]) -> tuple[tuple[int, int], bytes]:
    """Generate one image; return its size and its file."""
    response = client.post(f"/{endpoint}", json=request).raise_for_status()
    content = client.get(response.json()["images"][0]["url"]).raise_for_status().content
    return Image.open(io.BytesIO(content)).size, content


@pytest.mark.release
@pytest.mark.timeout(2 * LIMIT)
def test_uvx(place: Path) -> None:
    follow("test_uvx", place)


@pytest.mark.release
@pytest.mark.timeout(2 * LIMIT)
def test_pipx(place: Path) -> None:
    follow("test_pipx", place)


@pytest.mark.release
@pytest.mark.timeout(2 * LIMIT)
def test_pip(place: Path) -> None:
    follow("test_pip", place)


@pytest.mark.release
@pytest.mark.timeout(2 * LIMIT)
def test_pip_from_git(place: Path) -> None:
    follow("test_pip_from_git", place)


@pytest.mark.release
@pytest.mark.timeout(2 * LIMIT)
def test_the_job_of_a_python_application(packages: Packages, place: Path) -> None:
    """Run the steps for GitHub Actions with the Python example, whose environment does not contain flux-server."""
    page = (ROOT / "docs" / "testing-your-app.md").read_text(encoding="utf-8")
    steps = [step for step in re.findall(r"^ +- run: (.*?)(?: +#.*)?$", page, re.MULTILINE) if "npm" not in step]
    install, *others = steps
    assert len(others) == 2
    # With the wheel that is not published yet, and a PyTorch that UV_FIND_LINKS may provide.
    install = install.replace("--torch-backend cpu flux-server", f"'flux-server @ file://{packages.wheel}'")
    shutil.copytree(ROOT / "examples" / "python-app", place / "app")
    script = "\n".join((terminal(place), f"cd {place}/app", install, *others))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
