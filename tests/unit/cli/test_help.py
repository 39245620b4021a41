"""Tests of the help of `flux-server serve`: every setting with its option, its variable and its default."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from server.settings import Settings


@pytest.fixture(scope="module")
def help_text() -> str:
    environment = {**os.environ, "COLUMNS": "1000"}
    command = [sys.executable, "-m", "server", "serve", "--help"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_its_variable_and_default(help_text: str, name: str) -> None:
    assert f"[env: FLUX_SERVER_{name.upper()}; default: " in " ".join(help_text.split())


def test_the_version_is_that_of_the_package() -> None:
    command = [sys.executable, "-m", "server", "--version"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert printed == f"flux-server {version('flux-server')}\n"


def test_defaults_are_written_as_an_operator_would_write_them(help_text: str) -> None:
    text = " ".join(help_text.split())
    assert "[env: FLUX_SERVER_PORT; default: 8000]" in text
    assert "[env: FLUX_SERVER_KEYS; default: none]" in text
    assert "[env: FLUX_SERVER_DATA_DIR; default: $XDG_DATA_HOME/flux-server, else ~/.local/share/flux-server]" in text
