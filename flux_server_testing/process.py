"""A flux-server in a separate process, which ends when this process does, even by SIGKILL."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from flux_server_testing.controls import OPENER

#: Seconds that the server gets to start. The user's program may first install flux-server, as uvx does.
START_SECONDS = 600
_STOP_SECONDS = 30
#: Variables that would change the server's settings, or where Python finds the server's modules.
_NOT_INHERITED = re.compile(r"FLUX_SERVER_|FAL_|PYTHON(PATH|HOME|SAFEPATH|WARNINGS|STARTUP)$")
_URL = re.compile(r"listens on (http://\S+)")
_NO_SETTINGS: Mapping[str, str] = MappingProxyType({})


class NotStarted(Exception):
    """A server that could not be started; the message has the last lines of its log."""


def find_program(configured: Sequence[str] = ()) -> list[str]:
    """Return the command that runs flux-server: the configured one, or that of this environment or of PATH.

    Raises NotStarted if there is none.
    """
    if configured:
        return list(configured)
    neighbour = Path(sys.executable).with_name("flux-server")
    if neighbour.exists():
        return [str(neighbour)]
    if found := shutil.which("flux-server"):
        return [found]
    raise NotStarted(
        "There is no flux-server next to this Python nor on PATH: run pip install 'flux-server[testing]', or name the"
        " program in the ini option flux_server_program"
    )


class ServerProcess:
    """A running `flux-server serve --testing`, on free ports, with a data directory that the server removes."""

    def __init__(
        self,
        program: Sequence[str],
        options: Sequence[str] = (),
        settings: Mapping[str, str] = _NO_SETTINGS,
        *,
        exit_with: int | None = None,
    ) -> None:
        """Start the server and wait until it can generate images. Raises NotStarted.

        `settings` are variables FLUX_SERVER_*, for secrets, which other users must not see in a command line. The
        server stops when the process `exit_with` ends; the default is this process.
        """
        # Without a name, so that no file stays behind.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop` or `detach`
        pid = os.getpid() if exit_with is None else exit_with
        command = [*program, "serve", *options, "--testing", "--exit-with-process", str(pid)]
        environment = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.match(name)}
        # Without it, the application's own package `server` in this directory would come before flux-server's.
        environment |= {"PYTHONSAFEPATH": "1", **settings}
        try:
            self._process = subprocess.Popen(  # noqa: S603  the user's own program
                # A new session, so that Ctrl+C in a terminal does not stop the server before the tests end.
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise NotStarted(f"flux-server could not be started: {command[0]}: {error.strerror}") from None
        try:
            self.url = self._wait_until_ready(command)
        except BaseException:
            self.stop()
            raise

    @property
    def exit_code(self) -> int | None:
        """The exit code of a server that has ended; None while it runs."""
        return self._process.poll()

    def last_lines(self, number: int = 20) -> str:
        """Return the last lines of the server's log."""
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), size, 0).decode(errors="replace")
        return "\n".join(text.splitlines()[-number:])

    def detach(self) -> None:
        """Let the server run until the process `exit_with` ends."""
        # Popen warns of a process that it has not seen end.
        self._process.returncode = 0
        self._log.close()

    def stop(self) -> None:
        """Stop the server, and wait until it has removed its data directory."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                # The program may have started the server as a further process, as uvx does.
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()

    def _wait_until_ready(self, command: Sequence[str]) -> str:
        deadline, url = time.monotonic() + START_SECONDS, None
        while self._process.poll() is None and time.monotonic() < deadline:
            url = url or _URL.search(self.last_lines(1000))
            if url and is_ready(url[1]):
                return url[1]
            time.sleep(0.05)
        code = self._process.poll()
        problem = f"is not ready after {START_SECONDS} s" if code is None else f"ended with exit code {code}"
        raise NotStarted(
            f"flux-server {problem}. The command: {' '.join(command)}\nIts last lines:\n{self.last_lines()}"
        )


def is_ready(url: str) -> bool:
    """Return whether the server at this URL can generate images."""
    try:
        with OPENER.open(f"{url}/health/ready", timeout=10):
            return True
    except (urllib.error.URLError, OSError):
        return False
