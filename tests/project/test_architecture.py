"""Rules of the source tree that `lint-imports` does not check: light imports, short files, names and docstrings."""

import ast
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.settings import PREFIX, Settings
from tests.support import settings_page
from tests.support.server_process import ROOT

SOURCES = sorted(
    path
    for root in ("flux_server_testing", "models", "server")
    for path in (ROOT / root).rglob("*.py")
    if not path.is_relative_to(ROOT / "models" / "demo")
)
#: All but the packages installed for the tests, which are in node_modules and in directories that start with a dot.
TESTS = sorted(
    path
    for path in (ROOT / "tests").rglob("*.py")
    if not any(part.startswith(".") or part == "node_modules" for part in path.relative_to(ROOT).parts)
)
BENCH = sorted((ROOT / "bench").rglob("*.py"))
HEAVY = ("torch", "diffusers", "transformers", "accelerate")
MAX_FILE, MAX_FUNCTION = 300, 45
#: Exceptions: the queue holds every change of a job's state under one lock, and is easiest to read in one file.
LONGER = {"server.queue.queue": 315}


def name_of(path: Path) -> str:
    """Return the name of the module in this file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def imported(tree: ast.Module) -> set[str]:
    """Return the modules of this project that a module imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from server.api import responses` imports responses, but `from models import discover` imports models.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & set(MODULES)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function, including nested ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_imports_have_no_cycle() -> None:
    remaining = {module: imported(tree) - {module} for module, tree in MODULES.items()}
    while leaves := {module for module, needs in remaining.items() if not needs & set(remaining)}:
        remaining = {module: needs for module, needs in remaining.items() if module not in leaves}
    assert not remaining


def test_only_three_modules_discover_models() -> None:
    assert {module for module, tree in MODULES.items() if "models" in imported(tree)} == {
        "server.components",
        "server.cli.doctor",
        "server.cluster.runner",
    }


@pytest.mark.parametrize("module", ["server.app", "server.cli.serve", "server.cli.main", "models.flux_dev"])
def test_imports_are_light(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_discovering_models_is_light() -> None:
    code = f"import sys, models; models.discover(); print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGER.get(name_of(path), MAX_FILE)


@pytest.mark.parametrize("path", sorted((ROOT / "server" / "static").glob("*.js")), ids=lambda path: path.name)
def test_scripts_of_the_pages_are_short(path: Path) -> None:
    """They also begin with a comment that says what is in them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_FILE
    assert lines[0].startswith("// ")


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module: str) -> None:
    long = {
        function.name: length
        for function in functions(MODULES[module])
        if (length := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION
    }
    assert not long


@pytest.mark.parametrize("module", MODULES)
def test_modules_begin_with_a_one_line_docstring(module: str) -> None:
    docstring = ast.get_docstring(MODULES[module])
    assert docstring
    assert docstring.splitlines()[0].endswith(".")
    assert MODULES[module].body[0].lineno == 1


def undocumented(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Yield public classes, functions and methods without a docstring."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{node.name}.")


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module: str) -> None:
    assert not list(undocumented(MODULES[module].body))


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_no_marker_of_unfinished_work(path: Path) -> None:
    assert not re.search(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b", path.read_text(encoding="utf-8"))


def test_the_settings_page_is_up_to_date() -> None:
    # `python -m tests.support.settings_page` writes the page.
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page()
    assert [name for name in Settings.model_fields if f"`{PREFIX}{name.upper()}`" not in settings_page.page()] == []


#: Words of an earlier vocabulary, which tell a newcomer nothing.
_WORDS = (
    *("bell", "brought", "desk", "door", "everybody", "folder", "heard", "nobody", "paint", "painted", "painting"),
    *("picture", "seat", "somebody", "strike", "told", "whoever"),
)
_BANNED = re.compile(rf"(^|_)({'|'.join(_WORDS)})(_|s?$)", re.IGNORECASE)


def names(path: Path) -> Iterator[str]:
    """Yield the name of a file and every identifier in it."""
    yield path.stem
    with path.open("rb") as source:
        yield from (token.string for token in tokenize.tokenize(source.readline) if token.type == tokenize.NAME)


@pytest.mark.parametrize("path", [*SOURCES, *TESTS, *BENCH], ids=name_of)
def test_names_are_the_terms_of_the_field(path: Path) -> None:
    assert not {name for name in names(path) if _BANNED.search(name)}


@pytest.mark.parametrize("directory", sorted({path.parent for path in TESTS}), ids=str)
def test_every_directory_of_tests_is_a_package(directory: Path) -> None:
    # Else `import queue` would find tests/unit/queue. Models need no __init__.py, because the server discovers them.
    is_exempt = "models" in directory.parts or "faults" in directory.parts or directory.name in ("canary", "js")
    assert is_exempt or (directory / "__init__.py").is_file()


def test_every_package_is_installed() -> None:
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name_of(path) for path in SOURCES if path.name == "__init__.py"}
    assert set(configured["tool"]["setuptools"]["packages"]) == packages


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "unit").rglob("test_*.py")), ids=name_of)
def test_unit_tests_mirror_the_source_tree(path: Path) -> None:
    directory = path.parent.relative_to(ROOT / "tests" / "unit")
    assert any((ROOT / root / directory).is_dir() for root in ("server", "models"))
