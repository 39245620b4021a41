"""The guard on every address that comes from a request: what this server may connect to."""

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

#: The ports a web server is found on; the low ones belong to mail, shells and the like.
PORTS = frozenset({80, 443, *range(1024, 65536)})
MAX_REDIRECTS = 5
#: In characters. A longer ETag is not worth remembering: its file is downloaded again.
MAX_ETAG = 255
#: Seconds in which something must come, while a download goes on.
_QUIET_SECONDS = 20.0
_CHUNK = 2**18
#: Of the answer to a POST, whose status is all that counts; and beside the file that is downloaded.
MAX_ANSWER_BYTES = 2**16
#: What the system holds for us of it. After connecting: what was on its way by then may be as much again.
_SMALL_BUFFER = (socket.SOL_SOCKET, socket.SO_RCVBUF, 2**15)
_EVERYWHERE = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
#: ssrfguard's table, which judges an address that carries an IPv4 address by that one too; and of IPv6 only what the
#: internet has. Outside of it are ways to carry one that the table does not list, such as ::ffff:0:127.0.0.1.
_ADDRESSES = AddressTable(
    (
        *DEFAULT_DENIED.blocks,
        Block(ipaddress.ip_network("::/0"), "Reserved by IETF", "RFC4291", Reach.DENIED),
        Block(ipaddress.ip_network("2000::/3"), "Global Unicast", "RFC4291", Reach.PERMITTED),
    )
)

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ForbiddenURL(Exception):
    """The URL points somewhere a request must not reach."""


class OutboundClient:
    """Public addresses, and those the operator allows; each name is resolved once and that address connected to."""

    def __init__(self, allow: Sequence[str] = ()) -> None:
        networks, self._hosts = _parse_allowlist(allow)
        self._policy = Policy(denied_networks=_ADDRESSES, allowed_networks=networks, allowed_ports=PORTS)
        self._open_policy = Policy(allowed_networks=_EVERYWHERE, allowed_ports=PORTS)
        # Once: reading the public authorities takes 15 ms, in which nobody else is served.
        self._tls = httpx.create_ssl_context(trust_env=False)

    def check(self, url: str) -> None:
        """Judge what can be judged without a look-up: scheme, port, literal address. Raises ForbiddenURL."""
        try:
            self._policy_for(url).check_url(url)
        except (SSRFGuardError, ValueError) as error:
            raise self._refusal(url, error) from None

    async def post(self, url: str, content: bytes, headers: Mapping[str, str], seconds: float) -> int:
        """POST and return the status; no redirect is followed and no body read.

        Raises ForbiddenURL, or httpx.HTTPError when there was no answer.
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
        """GET into a file; gives its ETag, or "" for none or a long one.

        None, and no file, when it is the one of this `etag` still.

        Each redirect is judged anew; `seconds` are for all of it. `accepts` is shown the file's start, and raises
        InvalidInputFile where the rest need not come.

        Raises ForbiddenURL for addresses that may not be reached, and InvalidInputFile.
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
        raise InvalidInputFile("file_download_error", f"The download was sent on more than {MAX_REDIRECTS} times")

    async def _get(
        self, url: str, to: Path, max_bytes: int, etag: str, accepts: Callable[[bytes], None]
    ) -> httpx.Response:
        """One request, whose body is in the file if it has the one that is wanted."""
        self.check(url)
        # Not compressed, so that what is counted is what is kept.
        headers = {"accept-encoding": "identity", "user-agent": "flux-server"}
        headers |= {"if-none-match": etag} if etag else {}
        client = self._client(url, _QUIET_SECONDS)
        # Twice, because it may come in chunks, with a little beside each.
        bounded = _limit_response_bytes(2 * max_bytes + MAX_ANSWER_BYTES)
        async with client, client.stream("GET", url, headers=headers, extensions=bounded) as response:
            if response.has_redirect_location or (etag and response.status_code == 304):
                return response
            if response.status_code != 200:
                raise InvalidInputFile("file_download_error", f"The download was answered {response.status_code}")
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
        """What to say; where the operator could have allowed it, also how."""
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
    """Extensions of a request after which no more than this is read for it: interim answers never end otherwise."""
    left = max_bytes

    async def bound(event: str, told: Mapping[str, Any]) -> None:
        if event not in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            return
        stream = told["return_value"]
        read = stream.read

        async def read_less(size: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  its signature
            nonlocal left
            if left <= 0:
                raise httpcore.ReadError(f"the answer is longer than {max_bytes} bytes")
            found: bytes = await read(min(size, left), timeout)
            left -= len(found)
            return found

        stream.read = read_less

    return {"trace": bound}


def _short_message(error: Exception) -> str:
    """Its words without the list of all ports that are allowed."""
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
