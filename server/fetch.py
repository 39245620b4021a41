"""The guard on every address that comes from a request: what this server may connect to."""

import ipaddress
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import httpx
from ssrfguard import Policy, SSRFGuardError
from ssrfguard.httpx import AsyncClient

#: The ports a web server is found on; the low ones belong to mail, shells and the like.
PORTS = frozenset({80, 443, *range(1024, 65536)})
_EVERYWHERE = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ForbiddenURL(Exception):
    """The URL points somewhere a request must not reach."""


class Guard:
    """Public addresses, and those the operator allows; each name is resolved once and that address connected to."""

    def __init__(self, allow: Sequence[str] = ()) -> None:
        networks, self._hosts = _sorted_out(allow)
        self._policy = Policy(allowed_networks=networks, allowed_ports=PORTS)
        self._open_policy = Policy(allowed_networks=_EVERYWHERE, allowed_ports=PORTS)

    def check(self, url: str) -> None:
        """Judge what can be judged without a look-up: scheme, port, literal address. Raises ForbiddenURL."""
        try:
            self._policy_for(url).check_url(url)
        except (SSRFGuardError, ValueError) as error:
            hint = "; the setting --outbound-allow can permit it" if self._could_be_allowed(url) else ""
            raise ForbiddenURL(f"{_brief(error)}{hint}") from None

    async def post(self, url: str, content: bytes, headers: Mapping[str, str], seconds: float) -> int:
        """POST and return the status; no redirect is followed and no body read.

        Raises ForbiddenURL, or httpx.HTTPError when there was no answer.
        """
        try:
            client = AsyncClient(policy=self._policy_for(url), timeout=seconds, trust_env=False)
            async with client, client.stream("POST", url, content=content, headers=dict(headers)) as response:
                return response.status_code
        except SSRFGuardError as error:
            raise ForbiddenURL(_brief(error)) from None
        except (ValueError, httpx.InvalidURL) as error:
            raise ForbiddenURL(f"not a URL: {error}") from None

    def _could_be_allowed(self, url: str) -> bool:
        try:
            self._open_policy.check_url(url)
        except (SSRFGuardError, ValueError):
            return False
        return True

    def _policy_for(self, url: str) -> Policy:
        try:
            host = urlsplit(url).hostname
        except ValueError:
            return self._policy
        return self._open_policy if host in self._hosts else self._policy


def _brief(error: Exception) -> str:
    """Its words without the list of all ports that are allowed."""
    return str(error).partition(" (")[0] if "allowed_ports" in str(error) else str(error)


def _sorted_out(allow: Sequence[str]) -> tuple[tuple[_Network, ...], frozenset[str]]:
    networks: list[_Network] = []
    hosts: set[str] = set()
    for entry in allow:
        try:
            networks.append(ipaddress.ip_network(entry, strict=False))
        except ValueError:
            hosts.add(entry.lower())
    return tuple(networks), frozenset(hosts)
