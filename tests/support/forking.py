"""Programs that start at once, because they are forked from a process that has already imported their modules.

An import of PyTorch and diffusers takes up to ten seconds of a core, and the tests start hundreds of servers. Apart
from the imports, a forked program does what one from the command line does: it runs the same module under the name
`__main__`, in a process of its own with its own standard streams, environment and signals. Only its `atexit` functions
do not run.
"""

import functools
import gc
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
#: Resource limits, which a forked program has from its template.
_LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)

#: Variables that programs read when they run. All others, except the next ones, may have been read by an import.
_READ_LATER = ("FLUX_SERVER_", "FAL_", "PYTEST_", "CRASH_", "FAULTS_", "SEAL", "TORCHINDUCTOR_")
#: Variables that imports in the tests' own process have set: those of `library_env`, which the server sets too, and of
#: OpenCV.
_SET_BY_IMPORTS = (
    "DIFFUSERS_VERBOSITY",
    "DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "HF_HUB_DISABLE_TELEMETRY",
    "LD_LIBRARY_PATH",
    "PYTORCH_ALLOC_CONF",
    "RAY_USAGE_STATS_ENABLED",
    "SDNQ_USE_TORCH_COMPILE",
    "TRANSFORMERS_VERBOSITY",
)
#: What the template has of `_imports_and_limits`; None while forking is not enabled.
_template: tuple[dict[str, str], list[tuple[int, int]]] | None = None


class ForkedProcess:
    """A running program, with those methods of `subprocess.Popen` that tests use."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        # Without a lock, two threads could read the exit code at once, and one of them would find nothing.
        self._lock = threading.Lock()
        assert process.pid
        self.pid = process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while the program runs."""
        with self._lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code. Raises subprocess.TimeoutExpired."""
        wait([self._process.sentinel], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the program has ended."""
        with suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def enable() -> None:
    """Let programs be forked. Call this before any test changes the environment.

    Benchmarks do not call it, because they measure programs that start as users start them.
    """
    global _template
    _template = _imports_and_limits(os.environ)


def can_fork(environment: Mapping[str, str]) -> bool:
    """Return whether a forked program would be like one with this environment and with this process's limits."""
    return _template == _imports_and_limits(environment)


def fork(
    arguments: Sequence[str], environment: Mapping[str, str], *, stdin: int, stdout: int, stderr: int
) -> ForkedProcess:
    """Start `python -m server` with these arguments in a forked process, in the root of the repository.

    Args:
        arguments: the arguments of the command line.
        environment: the environment, for which `can_fork` must hold.
        stdin: an open file descriptor; likewise `stdout` and `stderr`. The caller closes it.
    """
    streams = [_Inherited(descriptor) for descriptor in (stdin, stdout, stderr)]
    process = _context().Process(target=_run, args=(list(arguments), dict(environment), streams))
    process.start()
    return ForkedProcess(process)


def run_flux_server(
    *arguments: str, environment: Mapping[str, str] | None = None, text: str = "", seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run `python -m server` with these arguments, forked if possible; return the completed process.

    Args:
        arguments: the arguments of the command line.
        environment: the environment; by default that of this process.
        text: the standard input.
        seconds: after these the program is killed, and subprocess.TimeoutExpired is raised.
    """
    environment = dict(os.environ) if environment is None else environment
    command = [sys.executable, "-m", "server", *arguments]
    if not can_fork(environment):
        options: dict[str, Any] = {"cwd": _ROOT, "env": environment, "timeout": seconds}
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False, **options)
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        stdin.write(text)
        stdin.seek(0)
        process = fork(arguments, environment, stdin=stdin.fileno(), stdout=out.fileno(), stderr=err.fileno())
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.forked_imports"])
    return context


def _imports_and_limits(environment: Mapping[str, str]) -> tuple[dict[str, str], list[tuple[int, int]]]:
    """Return the variables that imports may read, and the limits of this process."""
    ignored = (*_READ_LATER, *_SET_BY_IMPORTS)
    variables = {name: value for name, value in environment.items() if not name.startswith(ignored)}
    return variables, [resource.getrlimit(limit) for limit in _LIMITS]


class _Inherited:
    """A file descriptor, which becomes the number of its copy in the forked process.

    The copy is made while the process starts. An earlier copy would stay open if the process is killed at once.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _number_of, (DupFd(self._descriptor),)


def _number_of(copy: Any) -> int:
    return int(copy.detach())


def _run(arguments: list[str], environment: dict[str, str], streams: list[int]) -> None:
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    # `multiprocessing` passes over an import that fails.
    assert "models.flux.loader" in sys.modules
    # `multiprocessing` has opened another standard input.
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(_ROOT)
    sys.argv = ["server", *arguments]
    gc.enable()
    runpy.run_module("server", run_name="__main__", alter_sys=True)
