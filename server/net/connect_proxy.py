"""The CONNECT proxy on loopback: connects fal's host names to this server, and refuses other hosts by default.

A client that uses the proxy as HTTPS_PROXY opens tunnels to fal's hosts. Each tunnel ends at this server's TLS port,
whose certificate has the names of these hosts. From a client that uses the proxy as HTTP_PROXY, the proxy receives
complete requests and sends them to the plain port. So every fal-client works fully with environment variables alone.
When the server is down, so is the proxy, and no request reaches the real fal.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

from server.net.fal_hosts import is_certified, is_fal

log = logging.getLogger(__name__)

#: How many tunnels may be open at a time. Each holds two sockets.
MAX_TUNNELS = 512
#: The longest head of a request, in bytes: its first line and headers.
_MAX_HEAD = 16_384
#: The longest host name, in characters.
_MAX_HOST = 255
#: Seconds in which a client has to send the head of its request.
_HEAD_TIMEOUT = 10.0
_CHUNK = 65_536
_PLAIN_PORT, _TLS_PORT = 80, 443
_TARGET = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\s]+):(\d{1,5})")
#: A request to a proxy, with an absolute URL: the scheme, the host, and the port if there is one.
_FORWARDED = re.compile(
    rb"[A-Z]+ (https?|wss?)://(\[[0-9a-fA-F:.]+\]|[^:/?#\s@]+)(?::(\d{1,5}))?(?=[/?# ])", re.IGNORECASE
)
#: Headers that apply to a single connection. The proxy removes them and sends its own.
_HOP = re.compile(rb"(?im)^(proxy-)?connection:.*\r\n")
_LENGTH = re.compile(rb"(?im)^content-length:\s*(\d{1,18})\s*\r$")
_UPGRADE = re.compile(rb"(?im)^upgrade:")
_CHUNKED = re.compile(rb"(?im)^transfer-encoding:")

_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class ConnectProxy:
    """A proxy from fal's hosts to this server's ports. Other hosts are refused unless the operator allows them."""

    #: A tunnel is closed after this many seconds without data in either direction, even if its client waits for a run.
    idle_seconds = 600.0
    #: Seconds that connecting to the target may take.
    connect_seconds = 10.0

    def __init__(
        self, address: str, port: int, tls_port: int, allow_any_host: bool, max_tunnels: int = MAX_TUNNELS
    ) -> None:
        self._address, self._port, self._tls_port = address, port, tls_port
        self._allow_any_host = allow_any_host
        self._max_tunnels = max_tunnels
        self._tunnels: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> None:
        """Listen on this host and port. Raises OSError when the port is taken."""
        self._server = await asyncio.start_server(self._enter, host, port, limit=_MAX_HEAD)

    async def close(self) -> None:
        """Accept no more connections, and close the open tunnels."""
        if self._server:
            self._server.close()
        for tunnel in self._tunnels:
            tunnel.cancel()
        await asyncio.gather(*self._tunnels, return_exceptions=True)

    def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tunnels) >= self._max_tunnels:
            log.warning("the CONNECT proxy has %d tunnels open, its limit; another one is refused", self._max_tunnels)
            message = (
                f"This proxy has {self._max_tunnels} tunnels open, which is its limit; close one, or try again later."
            )
            writer.write(_response("503 Service Unavailable", message))
            writer.close()
            return
        # A separate task, because asyncio prints a traceback when the task that it creates itself is cancelled.
        tunnel = asyncio.create_task(self._serve(reader, writer))
        self._tunnels.add(tunnel)
        tunnel.add_done_callback(self._tunnels.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client connection until it ends."""
        try:
            await self._connect_client(reader, writer)
            await self._sent(writer)
        except TimeoutError:
            log.debug("the CONNECT proxy closed a tunnel that was idle for %.0f seconds", self.idle_seconds)
        finally:
            writer.transport.abort()

    async def _connect_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connect a client to its target and copy data until the tunnel ends, or send the reason for a refusal.

        Raises TimeoutError if the tunnel is idle for too long.
        """
        try:
            target = await _target_of(reader)
            there = await self._connect(target)
        except _Refused as refusal:
            writer.write(_response(refusal.line, str(refusal)))
            return
        try:
            if not target.request:
                writer.write(_response("200 Connection established"))
            await self._tunnel((reader, writer), there, target)
            await self._sent(there[1])
        finally:
            there[1].transport.abort()

    async def _tunnel(self, here: _Stream, there: _Stream, target: "_Target") -> None:
        """Copy data in both directions until both connections end.

        For a request with an absolute URL, stop when the response ends. Raises TimeoutError if no data comes for
        `idle_seconds`.
        """
        now = asyncio.get_running_loop().time
        there[1].write(target.request)
        async with asyncio.timeout(self.idle_seconds) as idle_timer:

            def restart_timer() -> None:
                if not idle_timer.expired():
                    idle_timer.reschedule(now() + self.idle_seconds)

            try:
                async with asyncio.TaskGroup() as ways:
                    sending = ways.create_task(_pipe(here[0], there[1], restart_timer, target.length))
                    answering = ways.create_task(_pipe(there[0], here[1], restart_timer))
                    if target.request:
                        # Any data after the request is the next request, perhaps for another host, so it is not copied.
                        await answering
                        sending.cancel()
            except* OSError as group:
                log.debug("the tunnel to %s:%d broke: %s", target.host, target.port, group.exceptions[0])

    async def _sent(self, writer: asyncio.StreamWriter) -> None:
        """Close a connection after its data is sent; wait at most `idle_seconds` for a peer that does not read."""
        writer.close()
        with contextlib.suppress(OSError):
            async with asyncio.timeout(self.idle_seconds):
                await writer.wait_closed()

    async def _connect(self, target: "_Target") -> _Stream:
        """Connect to the target, or to this server if the target is one of fal's hosts. Raises _Refused."""
        host, port = target.host, target.port
        if is_fal(host):
            is_plain = port == _PLAIN_PORT or bool(target.request)
            # A wildcard in a certificate covers one level only, so the certificate does not cover every deeper name.
            if not is_plain and not is_certified(host):
                raise _Refused("403 Not offered by this server", f"{host} is not offered by this server.")
            host, port = self._address, self._port if is_plain else self._tls_port
        elif not self._allow_any_host:
            log.warning("the CONNECT proxy refused %s:%d, which is not a host of fal; see --proxy-others", host, port)
            raise _Refused(
                "403 Not a host of fal, see --proxy-others",
                f"{host} is not one of fal's hosts; --proxy-others lets others through.",
            )
        try:
            async with asyncio.timeout(self.connect_seconds):
                return await asyncio.open_connection(host, port)
        except TimeoutError:
            message = f"{host}:{port} did not respond within {self.connect_seconds:.0f} seconds."
            raise _Refused("504 Gateway Timeout", message) from None
        # ValueError and OverflowError mean a name that cannot be looked up.
        except (OSError, ValueError, OverflowError):
            raise _Refused("502 Bad Gateway", f"{host}:{port} could not be reached.") from None


@dataclass(frozen=True)
class _Target:
    """The host and port that a client wants to reach.

    For a request with an absolute URL, `request` is its head, and `length` the number of bytes in its body. `length` is
    None for a body in chunks, and for a request that upgrades the connection. For CONNECT, `request` is empty.
    """

    host: str
    port: int
    request: bytes = b""
    length: int | None = None


class _Refused(Exception):
    """A refused request: `line` is the status line of the response."""

    def __init__(self, line: str, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def _not_understood() -> _Refused:
    return _Refused(
        "405 Method Not Allowed",
        "This proxy accepts CONNECT host:port and http:// URLs; https:// URLs only for fal's hosts.",
    )


async def _target_of(reader: asyncio.StreamReader) -> _Target:
    """Read the head of a request, and return its target. Raises _Refused."""
    try:
        async with asyncio.timeout(_HEAD_TIMEOUT):
            head = await reader.readuntil(b"\r\n\r\n")
    except TimeoutError:
        raise _Refused(
            "408 Request Timeout", f"The request's head did not arrive within {_HEAD_TIMEOUT:.0f} seconds."
        ) from None
    except asyncio.LimitOverrunError:
        raise _Refused(
            "431 Request Header Fields Too Large", f"The request's head is longer than {_MAX_HEAD} bytes."
        ) from None
    except (OSError, asyncio.IncompleteReadError):
        raise _Refused("400 Bad Request", "The connection broke before the request's head was complete.") from None
    if forwarded := _FORWARDED.match(head):
        return _forwarded(head, forwarded)
    method, _, rest = head.split(b"\r\n", 1)[0].decode("latin-1").partition(" ")
    if method != "CONNECT":
        raise _not_understood()
    match = _TARGET.fullmatch(rest.partition(" ")[0])
    return _target(match[1] if match else "", int(match[2]) if match else 0)


def _forwarded(head: bytes, match: re.Match[bytes]) -> _Target:
    is_secure, is_upgrade = match[1].lower() in (b"https", b"wss"), bool(_UPGRADE.search(head))
    port = int(match[3] or (_TLS_PORT if is_secure else _PLAIN_PORT))
    # One request per connection, because the next request may be for another host.
    request = head if is_upgrade else _HOP.sub(b"", head[:-2]) + b"connection: close\r\n\r\n"
    length = _LENGTH.search(head)
    is_unlimited = is_upgrade or bool(_CHUNKED.search(head))
    num_bytes = None if is_unlimited else int(length[1]) if length else 0
    target = _target(match[2].decode("latin-1"), port, request, num_bytes)
    # An https request for a host that is not fal's would leave this machine unencrypted.
    if is_secure and not is_fal(target.host):
        raise _not_understood()
    return target


def _target(host: str, port: int, request: bytes = b"", length: int | None = None) -> _Target:
    if not 0 < len(host) <= _MAX_HOST or not 0 < port < 65536:
        message = f"A request to this proxy needs a host, of at most {_MAX_HOST} characters, and a port."
        raise _Refused("400 Bad Request", message)
    return _Target(host.strip("[]").lower().rstrip("."), port, request, length)


def _response(line: str, reason: str = "") -> bytes:
    """Return a response that the proxy itself sends, as bytes."""
    body = reason.encode()
    length = f"content-length: {len(body)}\r\nconnection: close\r\n" if reason else ""
    return f"HTTP/1.1 {line}\r\n{length}\r\n".encode() + body


async def _pipe(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_chunk: Callable[[], None], length: int | None = None
) -> None:
    """Copy `length` bytes, or all if None; call `on_chunk` for each chunk. Raises OSError if a connection breaks."""
    while length != 0 and (chunk := await reader.read(_CHUNK if length is None else min(length, _CHUNK))):
        on_chunk()
        writer.write(chunk)
        await writer.drain()
        length = None if length is None else length - len(chunk)
    if length is None and writer.can_write_eof():
        writer.write_eof()
