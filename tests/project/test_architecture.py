"""Rules of the source tree beside those of `lint-imports`: what is light, small, named and documented."""

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
    for path in (*(ROOT / "server").rglob("*.py"), *(ROOT / "models").rglob("*.py"))
    if not path.is_relative_to(ROOT / "models" / "demo")
)
#: Without what is installed for the tests, in folders that begin with a dot.
TESTS = sorted(
    path
    for path in (ROOT / "tests").rglob("*.py")
    if not any(part.startswith(".") or part == "node_modules" for part in path.relative_to(ROOT).parts)
)
HEAVY = ("torch", "diffusers", "transformers", "accelerate")
MAX_FILE, MAX_FUNCTION = 300, 45
#: Longer files, and why: the queue is every change of a job's state under one lock, and reads best in one place.
LONGER = {"server.queue.queue": 315}


def name_of(path: Path) -> str:
    """The module in this file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def imported(tree: ast.Module) -> set[str]:
    """Modules of ours that this one imports, at its top or late."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from server.api import responses` is of responses, `from models import discover` of models itself.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return found & set(MODULES)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_imports_have_no_circle() -> None:
    waiting = {module: imported(tree) - {module} for module, tree in MODULES.items()}
    while free := {module for module, needs in waiting.items() if not needs & set(waiting)}:
        waiting = {module: needs for module, needs in waiting.items() if module not in free}
    assert not waiting


def test_only_three_modules_look_for_models() -> None:
    assert {module for module, tree in MODULES.items() if "models" in imported(tree)} == {
        "server.components",
        "server.cli.doctor",
        "server.cluster.runner",
    }


@pytest.mark.parametrize("module", ["server.app", "server.cli.serve", "server.cli.main", "models.flux_dev"])
def test_importing_brings_in_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_looking_for_models_brings_in_nothing_heavy() -> None:
    code = f"import sys, models; models.discover(); print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGER.get(name_of(path), MAX_FILE)


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module: str) -> None:
    long = {
        function.name: length
        for function in functions(MODULES[module])
        if (length := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION
    }
    assert not long


@pytest.mark.parametrize("module", MODULES)
def test_modules_begin_with_one_line(module: str) -> None:
    said = ast.get_docstring(MODULES[module])
    assert said
    assert said.splitlines()[0].endswith(".")
    assert MODULES[module].body[0].lineno == 1


def undocumented(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Public classes and functions, and their public methods, that say nothing."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{node.name}.")


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_says_what_it_is(module: str) -> None:
    assert not list(undocumented(MODULES[module].body))


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_nothing_is_left_to_do(path: Path) -> None:
    assert not re.search(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b", path.read_text(encoding="utf-8"))


def test_the_page_of_settings_shows_them_as_they_are() -> None:
    # `python -m tests.support.settings_page` writes it.
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page()
    assert [name for name in Settings.model_fields if f"`{PREFIX}{name.upper()}`" not in settings_page.page()] == []


#: Words of an earlier vocabulary, which tell a newcomer nothing.
_BANNED = re.compile(r"(^|_)(brought|bell|seat|desk|painted|whoever)(_|s?$)", re.IGNORECASE)


def names(path: Path) -> Iterator[str]:
    """The file's own name, and every identifier in it."""
    yield path.stem
    with path.open("rb") as source:
        yield from (token.string for token in tokenize.tokenize(source.readline) if token.type == tokenize.NAME)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_names_are_the_terms_of_the_field(path: Path) -> None:
    assert not {name for name in names(path) if _BANNED.search(name)}


@pytest.mark.parametrize("folder", sorted({path.parent for path in TESTS}), ids=str)
def test_every_folder_of_tests_is_a_package(folder: Path) -> None:
    # Without it, tests/unit/queue would be what `import queue` finds. The models are no modules: they are looked for.
    is_looked_for = "models" in folder.parts or "faults" in folder.parts or folder.name in ("canary", "js")
    assert is_looked_for or (folder / "__init__.py").is_file()


def test_every_package_is_installed() -> None:
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name_of(path) for path in SOURCES if path.name == "__init__.py"}
    assert set(configured["tool"]["setuptools"]["packages"]) == packages


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "unit").rglob("test_*.py")), ids=name_of)
def test_unit_tests_lie_where_their_source_does(path: Path) -> None:
    place = path.parent.relative_to(ROOT / "tests" / "unit")
    assert any((ROOT / root / place).is_dir() for root in ("server", "models"))
