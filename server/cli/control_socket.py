"""The way to `Control` from other processes: a Unix socket in the data folder that only its owner can open."""

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
_MAX_LINE = 1 << 20
#: A backup may take long.
_TIMEOUT = 3600.0


@asynccontextmanager
async def serve_control_socket(control: Control, data_dir: Path) -> AsyncIterator[None]:
    """Answer while the block lasts: a line of JSON for a line of JSON."""
    path = data_dir / NAME
    # Left behind by a kill; the folder is this process's own.
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX)
    with _reachable(data_dir) as address:
        bound.bind(address)
    path.chmod(0o600)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = json.loads(await reader.readline())
            writer.write(json.dumps(await asyncio.to_thread(_run_command, control, asked)).encode() + b"\n")
            await writer.drain()
        except (ValueError, ConnectionError):
            log.warning("the control socket was sent what it does not understand")
        finally:
            writer.close()

    server = await asyncio.start_unix_server(answer, sock=bound, limit=_MAX_LINE)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


def _run_command(control: Control, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": control.commands[asked["act"]](**asked["arguments"])}
    except (ValueError, DiskFull) as error:
        return {"error": str(error)}
    except Exception:
        log.exception("%s failed", asked.get("act"))
        return {"error": "The server could not do it; its log says why"}


def call(data_dir: Path, act: str, **arguments: Any) -> Any:
    """Have something done by the running server, or here where there is none. Raises ValueError, and OSError.

    Only a key may be the first thing in a new data folder.
    """
    if act != "add_key" and not (data_dir / FILE).is_file():
        raise OSError(f"there is no data folder of a server at {data_dir}; --data-dir names another")
    try:
        database = Database(data_dir)
    except DataDirInUse:
        return _call_server(data_dir, act, arguments)
    try:
        return Control(database, data_dir).commands[act](**arguments)
    finally:
        database.close()


def requires_key(data_dir: Path) -> bool:
    """Whether the server of this folder asks for a key: the running one, or the next. Does not take the folder."""
    with suppress(OSError, ValueError):
        return not _call_server(data_dir, "is_open", {})
    with suppress(sqlite3.Error):
        return bool(read_only_query(data_dir, "SELECT 1 FROM keys WHERE name <> ''"))
    return False


def _call_server(data_dir: Path, act: str, arguments: dict[str, Any]) -> Any:
    with socket.socket(socket.AF_UNIX) as connection, _reachable(data_dir) as address:
        connection.settimeout(_TIMEOUT)
        try:
            connection.connect(address)
        except OSError as error:
            raise OSError(f"the server that uses {data_dir} does not answer: {error.strerror}") from None
        connection.sendall(json.dumps({"act": act, "arguments": arguments}).encode() + b"\n")
        with connection.makefile() as lines:
            line = lines.readline()
    if not line:
        raise OSError(f"the server that uses {data_dir} ended before it answered")
    answer = json.loads(line)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["result"]


@contextmanager
def _reachable(data_dir: Path) -> Iterator[str]:
    """The socket's address; a folder whose path is too long for one is reached through its descriptor."""
    path = str(data_dir / NAME)
    if len(os.fsencode(path)) < 100:
        yield path
        return
    directory = os.open(data_dir, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{directory}/{NAME}"
    finally:
        os.close(directory)
