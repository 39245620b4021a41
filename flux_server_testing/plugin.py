"""The pytest plugin: the fixture `fal_server`, and the options of pytest that configure it.

Nothing happens, and nothing else is imported, until a test uses the fixture or an option asks for the server.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from flux_server_testing.controls import FalServer
    from flux_server_testing.session import Session

_SESSION: pytest.StashKey[Session] = pytest.StashKey()
#: On the process that runs parallel workers: the ids of the servers that its workers started.
_SHARED_PIDS: pytest.StashKey[list[int]] = pytest.StashKey()
#: The variable that pytest-xdist sets in each of its workers.
_WORKER = "PYTEST_XDIST_WORKER"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    url = "URL of a flux-server for tests that runs already, instead of starting one."
    parser.getgroup("flux-server").addoption("--flux-server-url", default="", help=url)
    parser.addini("flux_server_url", url, default="")
    parser.addini(
        "flux_server_program", "Command that runs flux-server; default: found next to Python, on PATH, by uvx."
    )
    parser.addini("flux_server_options", "Options and weights of `flux-server serve`.", "args")
    parser.addini(
        "flux_server_at_start",
        "Start the server before any of the application's modules is imported, because some make clients then.",
        "bool",
        default=False,
    )


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Start the server before conftest.py files and test modules are imported, if the ini option says so."""
    if early_config.getini("flux_server_at_start"):
        from flux_server_testing.controls import ServerError
        from flux_server_testing.process import NotStarted

        try:
            _open(early_config)
        except (NotStarted, ServerError) as error:
            raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def fal_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FalServer]:
    """Point fal's and OpenAI's clients at a real flux-server, and return its controls. Each test starts without faults.

    The variables are set for the whole session, and restored at its end.
    """
    from flux_server_testing.controls import ServerError
    from flux_server_testing.process import NotStarted

    config = request.config
    if _SESSION in config.stash:
        yield config.stash[_SESSION].server
        return
    try:
        session = _open(config, tmp_path_factory.getbasetemp().parent)
    except (NotStarted, ServerError) as error:
        pytest.fail(str(error), pytrace=False)
    yield session.server
    _close(config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Forget the last test's faults and requests."""
    if session := item.config.stash.get(_SESSION, None):
        session.reset()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Note the server that one of pytest-xdist's workers started for all of them."""
    if pid := getattr(node, "workeroutput", {}).get("flux_server_pid"):
        node.config.stash.setdefault(_SHARED_PIDS, []).append(pid)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the server that was started before the collection, or that the workers shared."""
    _close(config)
    if pids := config.stash.get(_SHARED_PIDS, []):
        from flux_server_testing.process import stop_process

        for pid in pids:
            stop_process(pid)


def _open(config: pytest.Config, directory: Path | None = None) -> Session:
    """Open the session; parallel workers share the server of this directory."""
    from flux_server_testing.session import Options, Session

    options = Options(
        config.known_args_namespace.flux_server_url or config.getini("flux_server_url"),
        shlex.split(config.getini("flux_server_program") or ""),
        config.getini("flux_server_options"),
    )
    worker = os.environ.get(_WORKER, "")
    session = Session(options, worker=worker, shared=directory if worker else None)
    config.stash[_SESSION] = session
    if session.shared_pid:
        config.workeroutput["flux_server_pid"] = session.shared_pid  # type: ignore[attr-defined]
    return session


def _close(config: pytest.Config) -> None:
    if session := config.stash.get(_SESSION, None):
        del config.stash[_SESSION]
        session.close()
