"""References in the documents: files, headings, settings, metrics and tests that they name must exist."""

import ast
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from server.metrics import Metrics
from server.settings import Settings
from tests.support.server_process import ROOT

NAMES = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
DOCUMENTS = [ROOT / name for name in NAMES] or sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
#: Options of other programs that the documents mention.
FOREIGN = {
    *(
        "--help",
        "--version",
        "--check",
        "--index-url",
        "--detach",
        "--clients",
        "--seconds",
        "--head",
        "--node-ip-address",
        "--address",
        "--from-literal",
        "--follow",
        "--build",
        "--profile",
        "--rm",
        "--entrypoint",
        "--pull",
        "--no-cache",
        "--require",
        "--now",
        "--data-binary",
        "--block",
        "--build-arg",
        "--from",
        "--torch-backend",
        "--test",
        "--path",
        "--default-non-nullable",
    ),
    *("--scope", "--owner", "--limit"),
    *("--all", "--random-weights", "--sizes", "--steps", "--rounds", "--waiting", "--requests", "--weights"),
    *("--plans", "--prompts", "--plot"),
    *("--torch-backend", "--flux-server-url", "--test", "--test-concurrency"),
    *(
        "--cap-gb",
        "--json",
        "--no-sandbox",
        "--device",
        "--scale",
        "--threads",
        "--eager",
        "--flow-iterations",
        "--from-scratch",
    ),
}


def headings(document: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a document."""
    lines = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_link_targets_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        assert not anchor or anchor in headings(path), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_exist(document: Path) -> None:
    known = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    known |= {f"--no-{name[2:]}" for name in known} | FOREIGN
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z\-]+", document.read_text(encoding="utf-8")))
    assert options <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_the_test_that_runs_them(document: Path) -> None:
    """Check that a comment before each block of commands names a test, or says why no test runs the block."""
    lines = document.read_text(encoding="utf-8").splitlines()
    for before, line in pairwise(["", *lines]):
        if not line.lstrip().startswith("```bash"):
            assert not re.match(r"\s*```(sh|shell|console)\b", line), "blocks of commands begin with ```bash"
            continue
        comment = re.fullmatch(r"<!-- (?:run by (tests/\S+\.py)::(test_\w+)|not run by a test: \w.*) -->", before)
        assert comment, f"write <!-- run by TEST --> or <!-- not run by a test: REASON -->, not {before!r}"
        assert not comment[1] or comment[2] in functions(ROOT / comment[1]), before


def functions(file: Path) -> set[str]:
    """Return the names of the functions of a Python file."""
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


#: The pytest plugin and its options, whose names begin like those of metrics.
_PLUGIN = ("testing", "url", "program", "options", "at_start")


def test_metrics_exist() -> None:
    text = Metrics().text().decode()
    gauges = (ROOT / "server" / "metrics.py").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        for name in re.findall(r"flux_server_(\w+)", document.read_text(encoding="utf-8")):
            is_metric = f"flux_server_{name.removesuffix('_total')}" in text or f'"{name}"' in gauges
            assert is_metric or name in _PLUGIN, name


def test_the_readme_is_short_and_links_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.split()) <= 700
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages <= set(re.findall(r"\]\(([^)#\s]+)\)", readme))
