"""Servers for an application's tests: the settings of --testing, and `run --testing`, which starts such a server."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import flux_server_testing
from flux_server_testing.controls import FalServer
from flux_server_testing.process import ServerProcess
from server.cli.client_env import check, environment
from server.net.tls import certificate_files
from server.settings import Settings, default_data_dir

#: Addresses of an application's own receivers of webhooks, and of its images.
_LOOPBACK = ("127.0.0.0/8", "::1/128")
_PORTS = ("port", "tls_port", "proxy_port")


def with_testing_defaults(settings: Settings) -> Settings:
    """With --testing, return the settings for tests; settings that the user chose stay. Else return them unchanged.

    Ports are free ones. The CONNECT proxy passes other hosts on, webhooks may go to this machine, and a stop waits for
    no request.
    """
    if not settings.testing:
        return settings
    defaults = {**dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True)), "proxy_others": True, "shutdown_grace": 0.0}
    # The CONNECT proxy needs the TLS port.
    kept = settings.model_fields_set | (set() if settings.tls_port else {"proxy_port"})
    chosen = {name: value for name, value in defaults.items() if name not in kept}
    return settings.model_copy(update={**chosen, "outbound_allow": (*settings.outbound_allow, *_LOOPBACK)})


@contextmanager
def data_dir_for_tests(settings: Settings) -> Iterator[Settings]:
    """With --testing and the default data directory, yield settings with a temporary one, removed when the block ends.

    Otherwise, yield the settings unchanged.
    """
    if not settings.testing or settings.data_dir != default_data_dir(os.environ):
        yield settings
        return
    with TemporaryDirectory(prefix="flux-server-", ignore_cleanup_errors=True) as directory:
        # PyTorch leaves temporary files too.
        os.environ["TMPDIR"] = tempfile.tempdir = directory
        yield settings.model_copy(update={"data_dir": Path(directory, "data")})


def run_with_server(settings: Settings, command: Sequence[str]) -> int:
    """Start a server for tests, run the command with every client pointed at it, stop it; return the exit code.

    Raises NotStarted, UnsupportedProgram, and OSError if the command cannot start.
    """
    # -P, because the directory may hold a package `server` of the application.
    server = ServerProcess([sys.executable, "-P", "-m", "server"], list(_options(settings)))
    try:
        found = FalServer(server.url).call("GET", "/testing/environment")
        at = settings.model_copy(update={**found["settings"], "data_dir": Path(found["settings"]["data_dir"])})
        files = certificate_files(at.data_dir)
        check(at, files, command)
        pytest = _pytest_variables(at.data_dir / "pytest")
        return _run(command, {**environment(at, files, os.environ), **found["variables"], **pytest})
    finally:
        server.stop()


def _pytest_variables(directory: Path) -> dict[str, str]:
    """Return the variables with which pytest finds the plugin, whose environment need not contain flux-server.

    The directory gets a link to the plugin alone, because flux-server's other packages must not come before the
    application's.
    """
    package = Path(flux_server_testing.__file__).parent
    directory.mkdir(exist_ok=True)
    with suppress(FileExistsError):
        (directory / package.name).symlink_to(package)
    paths = [str(directory), os.environ.get("PYTHONPATH", "")]
    plugins = [os.environ.get("PYTEST_PLUGINS", ""), f"{package.name}.plugin"]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTEST_PLUGINS": ",".join(filter(None, plugins))}


def _options(settings: Settings) -> Iterator[str]:
    """Yield the arguments of `serve` for the settings that the user chose."""
    yield from settings.weights
    for name in sorted(settings.model_fields_set - {"weights", "testing", "exit_with_process"}):
        value, flag = getattr(settings, name), name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif value is not None and value != default_data_dir(os.environ):
            yield f"--{flag}={','.join(value) if isinstance(value, tuple) else value}"


def _run(command: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run the command and return its exit code, as a shell does: 128 and the signal's number after a signal."""
    process = subprocess.Popen(list(command), env=dict(variables))  # noqa: S603  the user's command
    # A terminal sends Ctrl+C to the command too; this process waits for the command's end.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    code = process.wait()
    return code if code >= 0 else 128 - code


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
