"""Access to `Control` from other processes: a Unix socket in the data directory, for the user of the server only."""

import asyncio
import json
import logging
import os
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from server.cli.control import Control
from server.errors import DiskFull
from server.storage.database import FILE, Database, read_only_query
from server.storage.migrations import DataDirInUse

log = logging.getLogger(__name__)

NAME = "control"
#: Maximum bytes of a request.
_MAX_LINE = 1 << 20
#: Maximum seconds to wait for a response: a backup may take long.
_TIMEOUT = 3600.0


@asynccontextmanager
async def serve_control_socket(control: Control, data_dir: Path) -> AsyncIterator[None]:
    """Serve commands while the block lasts: each request and each response is one line of JSON."""
    path = data_dir / NAME
    # A killed server leaves its socket behind. This process has locked the directory, so it may delete the socket.
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX)
    with _reachable(data_dir) as address:
        bound.bind(address)
    path.chmod(0o600)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = json.loads(await reader.readline())
            writer.write(json.dumps(await asyncio.to_thread(_run_command, control, request)).encode() + b"\n")
            await writer.drain()
        except (ValueError, ConnectionError):
            log.warning(
                "a request on the control socket was invalid or broke off; send requests with the flux-server command"
            )
        finally:
            writer.close()

    server = await asyncio.start_unix_server(handle, sock=bound, limit=_MAX_LINE)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


def _run_command(control: Control, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": control.commands[request["act"]](**request["arguments"])}
    except (ValueError, DiskFull) as error:
        return {"error": str(error)}
    except Exception:
        log.exception("the operator's command %s failed", request.get("act"))
        return {"error": "The command failed in the server; see the server's log"}


def call(data_dir: Path, command: str, **arguments: Any) -> Any:
    """Run a command of `Control` in the running server, or in this process if there is none; return its result.

    Only `add_key` may create a new data directory. Raises ValueError, OSError, DiskFull and CorruptDatabase.
    """
    if command != "add_key" and not (data_dir / FILE).is_file():
        raise OSError(f"there is no data directory of a server at {data_dir}; select another with --data-dir")
    try:
        database = Database(data_dir)
    except DataDirInUse:
        return _call_server(data_dir, command, arguments)
    try:
        return Control(database, data_dir).commands[command](**arguments)
    finally:
        database.close()


def requires_key(data_dir: Path) -> bool:
    """Return whether the running server requires a key; without a running server, whether a named key is stored.

    This function does not lock the directory. If it cannot read the keys, it returns False.
    """
    with suppress(OSError, ValueError):
        return not _call_server(data_dir, "is_open", {})
    with suppress(sqlite3.Error):
        return bool(read_only_query(data_dir, "SELECT 1 FROM keys WHERE name <> ''"))
    return False


def _call_server(data_dir: Path, command: str, arguments: dict[str, Any]) -> Any:
    with socket.socket(socket.AF_UNIX) as connection, _reachable(data_dir) as address:
        connection.settimeout(_TIMEOUT)
        try:
            connection.connect(address)
        except OSError as error:
            raise OSError(f"the server that uses {data_dir} does not respond: {error.strerror}") from None
        connection.sendall(json.dumps({"act": command, "arguments": arguments}).encode() + b"\n")
        with connection.makefile() as lines:
            line = lines.readline()
    if not line:
        raise OSError(f"the server that uses {data_dir} ended before it responded; try again")
    response = json.loads(line)
    if "error" in response:
        raise ValueError(response["error"])
    return response["result"]


@contextmanager
def _reachable(data_dir: Path) -> Iterator[str]:
    """Yield the socket's path; one that is too long for a Unix socket is replaced by a short path in /proc."""
    path = str(data_dir / NAME)
    if len(os.fsencode(path)) < 100:
        yield path
        return
    directory = os.open(data_dir, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{directory}/{NAME}"
    finally:
        os.close(directory)
