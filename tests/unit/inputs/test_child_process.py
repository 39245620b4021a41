"""Tests of the processes that read untrusted files: what they get from the server."""

import resource
from pathlib import Path
from types import ModuleType

import pytest

from server.errors import InternalError
from server.inputs import child_process
from server.inputs.child_process import run_program


def program(directory: Path, source: str) -> ModuleType:
    """Write a program; return a module whose file it is."""
    module = ModuleType("a program")
    module.__file__ = str(directory / "program.py")
    (directory / "program.py").write_text(source)
    return module


def test_a_program_gets_the_file_and_arguments_and_returns_its_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    source = "import sys; print(open(sys.argv[1]).read(), sys.argv[2]); sys.stderr.write('bad'); sys.exit(3)"
    result = run_program(program(tmp_path, source), tmp_path / "file", "more", expected=(0, 3))
    assert (result.status, result.output, result.errors) == (3, b"content more\n", "bad")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "program.py"]


def test_a_program_does_not_get_the_servers_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLUX_SERVER_KEYS", "alice:secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = run_program(program(tmp_path, "import os, sys; print(dict(os.environ), sys.path)"), tmp_path / "file")
    assert b"secret" not in result.output
    assert str(tmp_path).encode() not in result.output


def test_a_program_that_fails_is_a_fault_of_the_server(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="a fault of the server"):
        run_program(program(tmp_path, "raise ValueError"), tmp_path / "file")


def test_a_program_that_takes_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(child_process, "MAX_SECONDS", 0.1)
    with pytest.raises(InternalError, match=r"did not end within 0\.1 seconds; try again"):
        run_program(program(tmp_path, "import signal; signal.pause()"), tmp_path / "file")


def test_a_limit_on_file_sizes_limits_the_output(tmp_path: Path) -> None:
    limit = f"import resource; resource.setrlimit({resource.RLIMIT_FSIZE}, (1000, 1000)); print('x' * 5000)"
    with pytest.raises(InternalError):
        run_program(program(tmp_path, limit), tmp_path / "file")
