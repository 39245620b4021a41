"""The CONNECT door: a proxy on loopback that brings fal's names to this server, and goes nowhere else.

A client that is told to use it as HTTPS_PROXY opens tunnels to fal's hosts; each ends at our own TLS port, whose
certificate bears those names. So every fal-client works whole with environment variables alone, and when the server
is down there is nothing to connect to: no request can reach the real cloud.
"""

import asyncio
import contextlib
import logging
import re

from server.address import FAL_HOSTS

log = logging.getLogger(__name__)

_MAX_HEAD = 16_384
#: Seconds a client gets to say where it wants to go.
_HEAD_TIMEOUT = 10.0
_CHUNK = 65_536
_TARGET = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\s]+):(\d{1,5})")

_Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class ConnectDoor:
    """Tunnels `CONNECT host:443` for fal's hosts to our TLS port; anything else is refused unless let through."""

    def __init__(self, tls_address: tuple[str, int], lets_others_through: bool) -> None:
        self._tls_address = tls_address
        self._lets_others_through = lets_others_through
        self._tunnels: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> None:
        """Listen. Raises OSError when the port is taken."""
        self._server = await asyncio.start_server(self._enter, host, port, limit=_MAX_HEAD)

    async def close(self) -> None:
        """Let nobody in any more, and end what is open."""
        if self._server:
            self._server.close()
        for tunnel in self._tunnels:
            tunnel.cancel()
        await asyncio.gather(*self._tunnels, return_exceptions=True)

    def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio's would print a traceback when the stop cancels it.
        tunnel = asyncio.create_task(self._serve(reader, writer))
        self._tunnels.add(tunnel)
        tunnel.add_done_callback(self._tunnels.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client connection from its first line to its end."""
        try:
            host, port = await _wanted(reader)
            there = await self._connect(host, port)
        except _Refused as refusal:
            await _answer(writer, refusal.line, str(refusal))
        else:
            await _answer(writer, "200 Connection established")
            await _tunnel((reader, writer), there)
        finally:
            writer.close()

    async def _connect(self, host: str, port: int) -> _Ends:
        if host in FAL_HOSTS:
            host, port = self._tls_address
        elif not self._lets_others_through:
            log.warning("the CONNECT door refused %s:%d", host, port)
            raise _Refused(
                "403 Not a host of fal, see --proxy-others",
                f"{host} is not one of fal's hosts; --proxy-others lets others through.",
            )
        try:
            return await asyncio.open_connection(host, port)
        # ValueError: a name that no look-up takes.
        except (OSError, ValueError, OverflowError):
            raise _Refused("502 Bad Gateway", f"{host}:{port} could not be reached.") from None


class _Refused(Exception):
    def __init__(self, line: str, reason: str) -> None:
        super().__init__(reason)
        self.line = line


async def _wanted(reader: asyncio.StreamReader) -> tuple[str, int]:
    """Host and port that the client asks for."""
    try:
        async with asyncio.timeout(_HEAD_TIMEOUT):
            head = await reader.readuntil(b"\r\n\r\n")
    except TimeoutError:
        raise _Refused("408 Request Timeout", "The request did not come in time.") from None
    except asyncio.LimitOverrunError:
        raise _Refused("431 Request Header Fields Too Large", "The request's head is too long.") from None
    except (OSError, asyncio.IncompleteReadError):
        raise _Refused("400 Bad Request", "The request broke off.") from None
    method, _, rest = head.split(b"\r\n", 1)[0].decode("latin-1").partition(" ")
    if method != "CONNECT":
        raise _Refused("405 Method Not Allowed", "This proxy understands CONNECT host:port only.")
    match = _TARGET.fullmatch(rest.partition(" ")[0])
    if not match or not 0 < int(match[2]) < 65536:
        raise _Refused("400 Bad Request", "CONNECT wants a host and a port.")
    return match[1].strip("[]").lower().rstrip("."), int(match[2])


async def _answer(writer: asyncio.StreamWriter, line: str, reason: str = "") -> None:
    body = reason.encode()
    length = f"content-length: {len(body)}\r\nconnection: close\r\n" if reason else ""
    writer.write(f"HTTP/1.1 {line}\r\n{length}\r\n".encode() + body)
    with contextlib.suppress(ConnectionError):
        await writer.drain()


async def _tunnel(here: _Ends, there: _Ends) -> None:
    """Carry bytes both ways until both sides have said all."""
    try:
        await asyncio.gather(_carry(here[0], there[1]), _carry(there[0], here[1]))
    except (ConnectionError, TimeoutError):
        log.debug("a tunnel broke")
    finally:
        there[1].close()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(_CHUNK):
        writer.write(chunk)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
