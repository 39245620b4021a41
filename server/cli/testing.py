"""Servers for an application's tests: the settings of --testing, and `run --testing`, which starts such a server."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import flux_server_testing
from flux_server_testing.controls import FalServer
from flux_server_testing.process import ServerProcess
from server.cli.client_env import check_ports, environment
from server.net.tls import certificate_files
from server.settings import PREFIX, Settings, default_data_dir

#: Addresses of an application's own receivers of webhooks, and of its images.
_LOOPBACK = ("127.0.0.0/8", "::1/128")
_PORTS = ("port", "tls_port", "proxy_port")


def with_testing_defaults(settings: Settings) -> Settings:
    """Return the settings for tests with --testing, and all settings unchanged without. What the user chose stays.

    Ports are free ones. The CONNECT proxy passes other hosts on, and a stop waits for no request. If only this machine
    reaches the server, webhooks may go to this machine.
    """
    if not settings.testing:
        return settings
    defaults = {**dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True)), "proxy_others": True, "shutdown_grace": 0.0}
    # The CONNECT proxy needs the TLS port.
    kept = settings.model_fields_set | (set() if settings.tls_port else {"proxy_port"})
    chosen = {name: value for name, value in defaults.items() if name not in kept}
    own = () if settings.is_reachable_remotely else _LOOPBACK
    return settings.model_copy(update={**chosen, "outbound_allow": (*settings.outbound_allow, *own)})


@contextmanager
def data_dir_for_tests(settings: Settings) -> Iterator[Settings]:
    """Yield the settings; with --testing and the default data directory, those with a temporary one.

    The temporary directory is removed when the block ends.
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

    Raises NotStarted, UnsupportedProgram, ServerError if the server requires a key that the settings do not contain,
    and OSError if the command cannot start.
    """
    check_ports(with_testing_defaults(settings), command)
    # -P, because the directory may hold a package `server` of the application.
    program = [sys.executable, "-P", "-m", "server"]
    server = ServerProcess(program, settings.weights, dict(_server_variables(settings)))
    try:
        key = next(iter((*settings.keys, *settings.operator_keys)), "")
        found = FalServer(server.url, key).call("GET", "/testing/environment")
        at = settings.model_copy(update={**found["settings"], "data_dir": Path(found["settings"]["data_dir"])})
        clients = {**environment(at, certificate_files(at.data_dir), os.environ), **found["variables"]}
        # In the data directory, which the server removes even if this process is killed.
        with TemporaryDirectory(prefix="pytest-", dir=at.data_dir) as directory:
            return _run(command, {**clients, **_pytest_variables(Path(directory))})
    finally:
        if server.exit_code is not None:
            print(f"flux-server: the server ended early. Its last lines:\n{server.last_lines()}", file=sys.stderr)
        server.stop()


def _pytest_variables(directory: Path) -> dict[str, str]:
    """Return the variables with which pytest finds the plugin, whose environment need not contain flux-server.

    The directory gets a link to the plugin alone, because flux-server's other packages must not come before the
    application's.
    """
    package = Path(flux_server_testing.__file__).parent
    (directory / package.name).symlink_to(package)
    paths = [str(directory), os.environ.get("PYTHONPATH", "")]
    plugins = [os.environ.get("PYTEST_PLUGINS", ""), f"{package.name}.plugin"]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTEST_PLUGINS": ",".join(filter(None, plugins))}


def _server_variables(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield the variables FLUX_SERVER_* for the settings that the user chose, apart from the weights."""
    for name in settings.model_fields_set - {"weights", "testing", "exit_with_process"}:
        value = getattr(settings, name)
        if value is not None and value != default_data_dir(os.environ):
            yield f"{PREFIX}{name.upper()}", ",".join(value) if isinstance(value, tuple) else str(value)


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
