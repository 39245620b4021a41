"""One test run's server: found, started or shared, and the environment variables that lead to it."""

import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from flux_server_testing.controls import FalServer, ServerError
from flux_server_testing.process import ServerProcess, find_program, is_ready

#: The variable that leads to a server which runs already, such as that of `flux-server run --testing`.
URL_VARIABLE = "FAL_SERVER_URL"
#: Names of files in the directory that parallel workers share.
_LOCK, _STATE = "flux-server.lock", "flux-server.json"


@dataclass(frozen=True)
class Options:
    """What the user configured: the URL of a server that runs, or the program to start and the server's options."""

    url: str = ""
    program: Sequence[str] = ()
    server_options: Sequence[str] = ()


class Session:
    """The server of this process's tests. While the session is open, the environment leads every client to it."""

    def __init__(self, options: Options, *, worker: str = "", shared: Path | None = None, parent: int = 0) -> None:
        """Find or start the server, and set the variables. Raises NotStarted and ServerError.

        `worker` names one of several parallel workers, each of which sees only its own requests. `shared` is their
        directory. The server that this session starts for all of them ends with the process `parent`.
        """
        self._process: ServerProcess | None = None
        self._worker, self._is_shared, self._parent = worker, bool(shared), parent
        self._bundle: Path | None = None
        self._replaced: dict[str, str | None] = {}
        try:
            self._open(options, shared)
        except BaseException:
            self.close()
            raise

    def _open(self, options: Options, shared: Path | None) -> None:
        url = options.url or os.environ.get(URL_VARIABLE, "")
        if not url:
            url = self._share(options, shared) if shared else self._start(options)
        key = f"{self._worker}:{secrets.token_hex(8)}" if self._worker else ""
        self.server = FalServer(url.rstrip("/"), key)
        variables = self._variables() | {URL_VARIABLE: self.server.url, "OPENAI_BASE_URL": f"{self.server.url}/v1"}
        variables |= self._certificate_variables(variables)
        # A server that runs already may have requests of an earlier test run.
        self.server.reset()
        self._replaced = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)

    def close(self) -> None:
        """Restore the environment, and stop the server if this session alone uses it."""
        for name, value in self._replaced.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if self._process and self._is_shared:
            self._process.detach()
        elif self._process:
            self._process.stop()
        if self._bundle:
            self._bundle.unlink(missing_ok=True)

    def reset(self) -> None:
        """Delete the last test's faults and records. Raises ServerError, with the end of the server's log."""
        try:
            self.server.reset()
        except ServerError as error:
            if self._process and self._process.exit_code is not None:
                raise ServerError(f"{error}\nThe server's last lines:\n{self._process.last_lines()}") from None
            raise

    def _variables(self) -> dict[str, str]:
        try:
            return self.server.variables()
        except ServerError as error:
            key = os.environ.get("FAL_KEY", "")
            # Only a server with fixed keys gets the developer's key.
            if not key or error.status != HTTPStatus.UNAUTHORIZED:
                raise
            if self._worker:
                raise ServerError("parallel workers need a server that accepts any key, without --keys") from None
            self.server = FalServer(self.server.url, key)
            return self.server.variables()

    def _certificate_variables(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that name the certificates, if the server's own file is in another container."""
        names = [name for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE") if name in variables]
        if all(Path(variables[name]).exists() for name in names):
            return {}
        descriptor, path = tempfile.mkstemp(prefix="flux-server-", suffix=".pem")
        self._bundle = Path(path)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self.server.certificates())
        return dict.fromkeys(names, path)

    def _start(self, options: Options, exit_with: int | None = None) -> str:
        self._process = ServerProcess(find_program(options.program), options.server_options, exit_with=exit_with)
        return self._process.url

    def _share(self, options: Options, directory: Path) -> str:
        """Return the URL of the workers' common server; the first worker starts it."""
        state = directory / _STATE
        with (directory / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                url: str = json.loads(state.read_text())["url"]
                if is_ready(url):
                    return url
            url = self._start(options, exit_with=self._parent)
            state.write_text(json.dumps({"url": url}))
        return url
