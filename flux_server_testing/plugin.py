"""The pytest plugin: the fixture `fal_server`, and the options of pytest that configure it.

Nothing happens, and nothing else is imported, until a test uses the fixture or an option asks for the server.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from flux_server_testing.controls import FalServer
    from flux_server_testing.session import Session

_SESSION: pytest.StashKey[Session] = pytest.StashKey()
#: The variables that pytest-xdist sets in each of its workers.
_WORKER, _NUM_WORKERS = "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"
#: The process that runs the workers, if this is a worker. Read at once: if that process is killed, this process gets
#: another parent, with which no server would ever end.
_PARENT = os.getppid()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    url = "URL of a flux-server for tests that runs already, instead of starting one."
    parser.getgroup("flux-server").addoption("--flux-server-url", default="", help=url)
    parser.addini("flux_server_url", url, default="")
    parser.addini("flux_server_program", "Command that runs flux-server; default: found next to Python, or on PATH.")
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
    """Delete the last test's faults and records."""
    if session := item.config.stash.get(_SESSION, None):
        session.reset()


def _open(config: pytest.Config, directory: Path | None = None) -> Session:
    """Open the session; parallel workers share the server of this directory."""
    from flux_server_testing.session import Options, Session

    options = Options(
        config.known_args_namespace.flux_server_url or config.getini("flux_server_url"),
        shlex.split(config.getini("flux_server_program") or ""),
        config.getini("flux_server_options"),
    )
    # A single worker shares its server with no other.
    worker = os.environ.get(_WORKER, "") if int(os.environ.get(_NUM_WORKERS, "1")) > 1 else ""
    session = Session(options, worker=worker, shared=directory if worker else None, parent=_PARENT)
    config.stash[_SESSION] = session
    # Pytest calls this also after a usage error, or if a conftest.py cannot be imported.
    config.add_cleanup(partial(_close, config))
    return session


def _close(config: pytest.Config) -> None:
    if session := config.stash.get(_SESSION, None):
        del config.stash[_SESSION]
        session.close()
