"""The house keeps its own rules: imports run one way, things are small, every setting is told."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.settings import PREFIX, Settings
from tests.serving import ROOT

#: From the door to the ground: a module imports from its own layer and from those below.
LAYERS = (
    {"server.cli.main"},
    {"server.cli.admin"},
    {"server.cli.serve", "server.logs", "server.cli.client_env", "server.cli.doctor", "server.cli.bench"},
    {"server.app"},
    {"server.cli.control_socket"},
    {"server.cli.control"},
    {"server.gauges", "server.counted", "server.overview"},
    {"server.api.dependencies", "server.cluster.head", "server.webhooks.delivery", "server.queue.retention"},
    {"server.cluster.gpu_slot", "server.cluster.router"},
    {"server.cluster.ray_backend"},
    {"server.cluster.runner"},
    {"server.worker.worker", "server.webhooks.delivery", "server.queue.retention"},
    {
        "server.worker.scheduler",
        "server.worker.postprocessor",
        "server.worker.pending_jobs",
        "server.cluster.message_checks",
    },
    {"server.cluster.runner_queue"},
    {"server.worker.engine_pool", "server.worker.running_job"},
    {
        "server.admission",
        "server.net.timeouts",
        "server.net.connect_proxy",
        "server.api.validation",
        "server.api.submissions",
        "server.worker.results",
        "server.api.openapi",
        "server.api.fal_openapi",
        "server.http_errors",
    },
    {"server.storage.uploads", "server.inputs.resolver"},
    {"server.inputs.hub", "server.inputs.cache", "server.storage.multipart", "server.net.websocket"},
    {"server.queue.queue", "server.net.outbound", "server.auth", "server.net.tls", "server.webhooks.signing"},
    {
        "server.queue.job_table",
        "server.queue.request_log",
        "server.queue.waiting_index",
        "server.queue.pending_storage",
        "server.net.bytes_in_flight",
    },
    {"server.storage.file_store"},
    {
        "server.address",
        "server.storage.database",
        "server.api.sse",
        "server.queue.history",
        "server.queue.usage",
        "server.api.headers",
        "server.api.rate_limit",
        "server.worker.watchdog",
        "server.worker.crash_recorder",
        "server.queue.retry",
    },
    {"server.pictures", "server.inputs.loras"},
    {"server.picture_parts", "server.inputs.lora_header"},
    {"server.metrics", "server.net.fal_hosts"},
    {
        "server.queue.notifier",
        "server.queue.jobs",
        "server.api.responses",
        "server.settings",
        "server.net.fair_share",
        "server.executor",
        "server.errors",
        "server.gpu",
        "server.library_env",
    },
    {"models"},
    {"models.*"},
    {"models.benchmark.compare", "models.benchmark.random_weights"},
    {"models.flux.engine"},
    {"models.flux.batch"},
    {
        "models.flux.sample",
        "models.flux.acceleration",
        "models.flux.safety_checker",
        "models.flux.device",
        "models.flux.loras",
        "models.flux.task",
        "models.flux.redux",
    },
    {"models.weights", "models.flux.preview"},
    {
        "models.flux.first_block_cache",
        "models.loading.hub",
        "models.loading.memory_plans",
        "models.flux.prompt_cache",
        "models.loading.verify",
        "models.flux.flops",
    },
    {"models.base", "models.loading.cpu", "models.schema", "models.flux.sharing"},
)
SOURCES = sorted([*(ROOT / "server").rglob("*.py"), *(ROOT / "models").glob("*.py")])
HEAVY = ("torch", "diffusers", "transformers", "accelerate")
MAX_FILE, MAX_FUNCTION = 300, 45


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
            # `from server import wire` is of wire, `from models import discover` of models itself.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return found & set(MODULES)


def layer_of(module: str) -> int:
    """How far down a module lives; a model of its own needs no entry."""
    known = {name: number for number, names in enumerate(LAYERS) for name in names}
    short = ".".join(module.split(".")[:2])
    if short not in known and short.startswith("models."):
        short = "models.*"
    assert short in known, f"{module} is new: say in LAYERS of {Path(__file__).name} where it lives"
    return known[short]


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    up = {other for other in imported(MODULES[module]) if layer_of(other) < layer_of(module)}
    assert not up, f"{module} imports what stands above it"


def test_imports_have_no_circle() -> None:
    waiting = {module: imported(tree) - {module} for module, tree in MODULES.items()}
    # The package of the routes hands its nouns what they share.
    while free := {module for module, needs in waiting.items() if not needs & set(waiting)}:
        waiting = {module: needs for module, needs in waiting.items() if module not in free}
    assert not waiting


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("models")])
def test_models_know_no_server(module: str) -> None:
    roots = {
        name.partition(".")[0]
        for node in ast.walk(MODULES[module])
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not roots & {"server", "fastapi", "starlette", "uvicorn", "httpx", "sqlite3"}


def test_routes_and_worker_meet_in_the_queue() -> None:
    assert not {
        module for module in imported(MODULES["server.worker.worker"]) if module.startswith("server.api.dependencies")
    }
    nouns = [module for module in MODULES if module.startswith("server.api.dependencies.")]
    assert nouns
    assert not [module for module in nouns if "server.worker.worker" in imported(MODULES[module])]


def test_only_app_and_doctor_look_for_models() -> None:
    assert {module for module, tree in MODULES.items() if "models" in imported(tree)} == {
        "server.app",
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
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE


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


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))], ids=name_of)
def test_nothing_is_left_to_do(path: Path) -> None:
    assert not re.search(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b", path.read_text(encoding="utf-8"))


ROWS = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if f"`{PREFIX}" in line]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_in_the_readme(name: str) -> None:
    rows = [row for row in ROWS if row.startswith("|") and f"`{PREFIX}{name.upper()}`" in row]
    assert len(rows) == 1
    flag = name.replace("_", "-")
    options = ("`WEIGHTS…`",) if name == "weights" else (f"`--{flag}`", f"`--[no-]{flag}`")
    assert any(option in rows[0].split("|")[1] for option in options)


def test_the_readme_has_no_setting_that_is_gone() -> None:
    told = {found.lower() for row in ROWS for found in re.findall(rf"`{PREFIX}([A-Z_]+)`", row)}
    assert told == set(Settings.model_fields)
