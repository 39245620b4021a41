"""fal's host names and their roles.

Every name under fal's domains counts as fal's, so that a program that is redirected to this server cannot reach the
real fal by any of them. Only the names that clients use have a role.
"""

from enum import StrEnum

#: These names, and all names under them, are fal's. fal-client falls back to falrun.com when fal.run does not respond.
DOMAINS = ("fal.ai", "fal.dev", "fal.media", "fal.run", "falrun.com")


class Role(StrEnum):
    """The API that a host name serves."""

    #: A synchronous run, a stream, or realtime.
    RUN = "run"
    QUEUE = "queue"
    #: Uploads, files, tokens, public keys.
    REST = "rest"
    #: The platform API: models, prices, usage, history.
    PLATFORM = "platform"
    #: The website's documents about an endpoint.
    SITE = "site"


_ROLES = {
    "fal.run": Role.RUN,
    "ws.fal.run": Role.RUN,
    "falrun.com": Role.RUN,
    "queue.fal.run": Role.QUEUE,
    "queue.falrun.com": Role.QUEUE,
    "rest.fal.ai": Role.REST,
    "rest.alpha.fal.ai": Role.REST,
    "fal.media": Role.REST,
    "v3.fal.media": Role.REST,
    "v3b.fal.media": Role.REST,
    "api.fal.ai": Role.PLATFORM,
    "fal.ai": Role.SITE,
}
#: fal's names in the certificate. A wildcard covers one level only, so deeper names that clients use are listed too.
CERTIFICATE_NAMES = tuple(
    sorted({*DOMAINS, *_ROLES, *(f"*.{domain}" for domain in (*DOMAINS, "alpha.fal.ai", "gateway.alpha.fal.ai"))})
)


def is_fal(hostname: str) -> bool:
    """Return whether a lower-case name without a port is one of fal's domains or under one."""
    name = hostname.rstrip(".")
    return any(name == domain or name.endswith(f".{domain}") for domain in DOMAINS)


def role_of(hostname: str) -> Role | None:
    """Return the role of a host name; None if this server offers nothing under the name."""
    return _ROLES.get(hostname.rstrip("."))


def is_certified(hostname: str) -> bool:
    """Return whether the server's certificate covers this name."""
    name = hostname.rstrip(".")
    return name in CERTIFICATE_NAMES or f"*.{name.partition('.')[2]}" in CERTIFICATE_NAMES
