"""An HTTP client for URLs that come from requests, and the rules for the addresses that it may connect to."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpcore
import httpx
from ssrfguard import DEFAULT_DENIED, AddressTable, Block, Policy, Reach, SSRFGuardError
from ssrfguard.httpx import AsyncClient

from server.errors import InvalidInputFile

#: The allowed ports. Other low ports belong to mail, shells and similar services.
PORTS = frozenset({80, 443, *range(1024, 65536)})
MAX_REDIRECTS = 5
#: The longest ETag that is returned, in characters. A file with a longer ETag is downloaded again each time.
MAX_ETAG = 255
#: Seconds without data after which a download fails.
_QUIET_SECONDS = 20.0
_CHUNK = 2**18
#: The most bytes that are read of a response to a POST, of which only the status is used. For a download, the room for
#: the headers of the response.
MAX_ANSWER_BYTES = 2**16
#: A small receive buffer of the system for the response to a POST, whose body is not read. The option is set after
#: connecting, so data that is already in flight may take as much again.
_SMALL_BUFFER = (socket.SOL_SOCKET, socket.SO_RCVBUF, 2**15)
_EVERYWHERE = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
#: ssrfguard's table, which also judges the IPv4 address inside an IPv6 address. Of the IPv6 addresses, only global
#: unicast ones are allowed: others can contain IPv4 addresses in ways that the table does not list
#: (::ffff:0:127.0.0.1).
_ADDRESSES = AddressTable(
    (
        *DEFAULT_DENIED.blocks,
        Block(ipaddress.ip_network("::/0"), "Reserved by IETF", "RFC4291", Reach.DENIED),
        Block(ipaddress.ip_network("2000::/3"), "Global Unicast", "RFC4291", Reach.PERMITTED),
    )
)

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ForbiddenURL(Exception):
    """A URL that this server must not connect to, or that is not a URL."""


class OutboundClient:
    """A client for public addresses, and for the private ones that the operator allows.

    Each name is resolved once, and the client connects to the address that was checked.
    """

    def __init__(self, allow: Sequence[str] = ()) -> None:
        networks, self._hosts = _parse_allowlist(allow)
        self._policy = Policy(denied_networks=_ADDRESSES, allowed_networks=networks, allowed_ports=PORTS)
        self._open_policy = Policy(allowed_networks=_EVERYWHERE, allowed_ports=PORTS)
        # Created once, because reading the list of certificate authorities blocks the event loop for 15 ms.
        self._tls = httpx.create_ssl_context(trust_env=False)

    def check(self, url: str) -> None:
        """Check scheme, port and literal address, without a DNS look-up. Raises ForbiddenURL."""
        try:
            self._policy_for(url).check_url(url)
        except (SSRFGuardError, ValueError) as error:
            raise self._refusal(url, error) from None

    async def post(self, url: str, content: bytes, headers: Mapping[str, str], seconds: float) -> int:
        """Send a POST request; return the status. Redirects are not followed, and the response's body is not read.

        Raises ForbiddenURL, and httpx.HTTPError when there is no response.
        """
        try:
            client, bounded = (
                self._client(url, seconds, socket_options=[_SMALL_BUFFER]),
                _limit_response_bytes(MAX_ANSWER_BYTES),
            )
            async with client, client.stream("POST", url, content=content, headers=headers, extensions=bounded) as sent:
                return sent.status_code
        except SSRFGuardError as error:
            raise self._refusal(url, error) from None
        except (ValueError, httpx.InvalidURL) as error:
            raise ForbiddenURL(f"not a URL: {error}") from None

    async def download(
        self,
        url: str,
        to: Path,
        max_bytes: int,
        seconds: float,
        etag: str = "",
        accepts: Callable[[bytes], None] = lambda start: None,
    ) -> str | None:
        """Download a file to the path `to`; return its ETag, or "" if it has none or one longer than MAX_ETAG.

        If the file at the URL still has this `etag`, return None and write nothing.

        Each redirect is checked like the first URL. `seconds` limits the whole download. `accepts` checks the first
        bytes, and raises InvalidInputFile to stop the download.

        Raises ForbiddenURL for a URL that must not be reached, InvalidInputFile for a download that fails, and OSError.
        """
        try:
            async with asyncio.timeout(seconds):
                for _ in range(MAX_REDIRECTS + 1):
                    response = await self._get(url, to, max_bytes, etag, accepts)
                    if not response.has_redirect_location:
                        return None if response.status_code == 304 else _etag(response)
                    url = str(response.url.join(response.headers["location"]))
        except TimeoutError:
            raise InvalidInputFile(
                "file_download_error", f"The download took longer than {seconds:.0f} seconds"
            ) from None
        except SSRFGuardError as error:
            raise self._refusal(url, error) from None
        except (ValueError, httpx.InvalidURL) as error:
            raise ForbiddenURL(f"not a URL: {error}") from None
        except httpx.HTTPError as error:
            host = urlsplit(url).hostname
            message = f"The download from {host} failed: {type(error).__name__} {_short_message(error)}".strip()
            raise InvalidInputFile("file_download_error", message) from None
        raise InvalidInputFile("file_download_error", f"The download was redirected more than {MAX_REDIRECTS} times")

    async def _get(
        self, url: str, to: Path, max_bytes: int, etag: str, accepts: Callable[[bytes], None]
    ) -> httpx.Response:
        """Send one request and return the response. For status 200, write the body to the path `to` first.

        Raises ForbiddenURL, and InvalidInputFile for an error status or a file that is too large or not accepted.
        """
        self.check(url)
        # Ask for no compression, so that the bytes counted are the bytes stored.
        headers = {"accept-encoding": "identity", "user-agent": "flux-server"}
        headers |= {"if-none-match": etag} if etag else {}
        client = self._client(url, _QUIET_SECONDS)
        # Allow twice the size, because the body may come in small chunks, each with overhead.
        bounded = _limit_response_bytes(2 * max_bytes + MAX_ANSWER_BYTES)
        async with client, client.stream("GET", url, headers=headers, extensions=bounded) as response:
            if response.has_redirect_location or (etag and response.status_code == 304):
                return response
            if response.status_code != 200:
                host = urlsplit(url).hostname
                message = f"The download from {host} failed: the host responded {response.status_code}; check the URL"
                raise InvalidInputFile("file_download_error", message)
            too_large = InvalidInputFile(
                "file_too_large", f"The file is larger than {max_bytes} bytes", max_size=max_bytes
            )
            length = response.headers.get("content-length", "")
            if length.isdecimal() and int(length) > max_bytes:
                raise too_large
            size = 0
            with to.open("wb") as file:
                async for chunk in response.aiter_raw(_CHUNK):
                    if size == 0:
                        accepts(chunk)
                    size += len(chunk)
                    if size > max_bytes:
                        raise too_large
                    await asyncio.to_thread(file.write, chunk)
        return response

    def _client(self, url: str, seconds: float, **options: Any) -> AsyncClient:
        policy = self._policy_for(url)
        return AsyncClient(policy=policy, timeout=seconds, verify=self._tls, trust_env=False, **options)

    def _refusal(self, url: str, error: Exception) -> ForbiddenURL:
        """Build the error for a refused URL. The message names the setting, if the operator can allow the URL."""
        try:
            self._open_policy.check_url(url)
        except (SSRFGuardError, ValueError):
            return ForbiddenURL(_short_message(error))
        return ForbiddenURL(f"{_short_message(error)}; the setting --outbound-allow can permit it")

    def _policy_for(self, url: str) -> Policy:
        try:
            host = urlsplit(url).hostname
        except ValueError:
            return self._policy
        return self._open_policy if host in self._hosts else self._policy


def _etag(response: httpx.Response) -> str:
    etag = response.headers.get("etag", "")
    return etag if len(etag) <= MAX_ETAG else ""


def _limit_response_bytes(max_bytes: int) -> dict[str, Any]:
    """Return request extensions of httpx that make reading fail after `max_bytes` of the response.

    Without this limit, a server could send interim responses forever.
    """
    left = max_bytes

    async def trace(event: str, info: Mapping[str, Any]) -> None:
        if event not in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            return
        stream = info["return_value"]
        read = stream.read

        async def read_less(size: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  httpcore's signature
            nonlocal left
            if left <= 0:
                raise httpcore.ReadError(f"the response is longer than {max_bytes} bytes")
            data: bytes = await read(min(size, left), timeout)
            left -= len(data)
            return data

        stream.read = read_less

    return {"trace": trace}


def _short_message(error: Exception) -> str:
    """Return an error's message without the list of all allowed ports."""
    return str(error).partition(" (")[0] if "allowed_ports" in str(error) else str(error)


def _parse_allowlist(allow: Sequence[str]) -> tuple[tuple[_Network, ...], frozenset[str]]:
    networks: list[_Network] = []
    hosts: set[str] = set()
    for entry in allow:
        try:
            networks.append(ipaddress.ip_network(entry, strict=False))
        except ValueError:
            hosts.add(entry.lower())
    return tuple(networks), frozenset(hosts)
