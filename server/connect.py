"""The CONNECT door: a proxy on loopback that brings fal's names to this server, and goes nowhere else.

A client that is told to use it as HTTPS_PROXY opens tunnels to fal's hosts; each ends at our own TLS port, whose
certificate bears those names. So every fal-client works whole with environment variables alone, and when the server
is down there is nothing to connect to: no request can reach the real cloud.
"""

import asyncio
import contextlib
import logging

from server.address import FAL_HOSTS

log = logging.getLogger(__name__)

_MAX_HEAD = 16_384
#: Seconds a client gets to say where it wants to go.
_HEAD_TIMEOUT = 10.0
_CHUNK = 65_536


class ConnectDoor:
    """Tunnels `CONNECT host:443` for fal's hosts to our TLS port; anything else is refused unless let through."""

    def __init__(self, tls_port: int, lets_others_through: bool) -> None:
        self._tls_port = tls_port
        self._lets_others_through = lets_others_through

    async def enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client connection from its first line to its end."""
        try:
            async with asyncio.timeout(_HEAD_TIMEOUT):
                host, port = _target(await reader.readuntil(b"\r\n\r\n"))
            there = await self._connect(host, port)
        except _Refused as refusal:
            await _answer(writer, refusal.line, str(refusal))
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            await _answer(writer, "502 Bad Gateway", "The other side could not be reached.")
        else:
            await _answer(writer, "200 Connection established")
            await _tunnel((reader, writer), there)

    async def _connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if host in FAL_HOSTS:
            return await asyncio.open_connection("127.0.0.1", self._tls_port)
        if not self._lets_others_through:
            log.warning("the CONNECT door refused %s:%d", host, port)
            raise _Refused("403 Forbidden", f"{host} is not one of fal's hosts; --proxy-others lets others through.")
        return await asyncio.open_connection(host, port)


class _Refused(Exception):
    def __init__(self, line: str, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def _target(head: bytes) -> tuple[str, int]:
    method, _, rest = head.split(b"\r\n", 1)[0].decode("latin-1").partition(" ")
    host, _, port = rest.partition(" ")[0].rpartition(":")
    if method != "CONNECT" or not port.isdecimal():
        raise _Refused("405 Method Not Allowed", "This proxy understands CONNECT host:port only.")
    return host.strip("[]").lower().rstrip("."), int(port)


async def _answer(writer: asyncio.StreamWriter, line: str, reason: str = "") -> None:
    body = reason.encode()
    length = f"content-length: {len(body)}\r\nconnection: close\r\n" if reason else ""
    writer.write(f"HTTP/1.1 {line}\r\n{length}\r\n".encode() + body)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    if reason:
        writer.close()


_Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _tunnel(here: _Ends, there: _Ends) -> None:
    """Carry bytes both ways until both sides have said all."""
    try:
        await asyncio.gather(_carry(here[0], there[1]), _carry(there[0], here[1]))
    except (ConnectionError, TimeoutError):
        log.debug("a tunnel broke")
    finally:
        here[1].close()
        there[1].close()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(_CHUNK):
        writer.write(chunk)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


async def listen(host: str, port: int, tls_port: int, lets_others_through: bool) -> asyncio.Server:
    """Open the door. Raises OSError when the port is taken."""
    door = ConnectDoor(tls_port, lets_others_through)
    return await asyncio.start_server(door.enter, host, port, limit=_MAX_HEAD)
