"""fal's host names: which there are, and what each is for.

Every name under fal's domains belongs here, known or not: a program that is pointed at this server must reach fal by
none of them. What a name is for is known of the names that clients use.
"""

from enum import StrEnum

#: Everything at or under these is fal's. falrun.com is where fal-client turns to when fal.run does not answer.
DOMAINS = ("fal.ai", "fal.dev", "fal.media", "fal.run", "falrun.com")


class Role(StrEnum):
    """What is asked for under a name."""

    #: A synchronous run, a stream, or realtime.
    RUN = "run"
    QUEUE = "queue"
    #: Uploads, files, tokens, public keys.
    REST = "rest"
    #: The platform API: models, prices, usage, history.
    PLATFORM = "platform"
    #: The website's documents of an endpoint.
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
#: For a certificate: a wildcard stands for one label, so the deeper names that clients use are listed too.
CERTIFICATE_NAMES = tuple(
    sorted({*DOMAINS, *_ROLES, *(f"*.{domain}" for domain in (*DOMAINS, "alpha.fal.ai", "gateway.alpha.fal.ai"))})
)


def is_fal(hostname: str) -> bool:
    """Whether a name in small letters, without port, is under fal's domains."""
    name = hostname.rstrip(".")
    return any(name == domain or name.endswith(f".{domain}") for domain in DOMAINS)


def role_of(hostname: str) -> Role | None:
    """What a name under fal's domains is for; None where this server offers nothing under it."""
    return _ROLES.get(hostname.rstrip("."))


def is_certified(hostname: str) -> bool:
    """Whether the server's certificate bears this name."""
    name = hostname.rstrip(".")
    return name in CERTIFICATE_NAMES or f"*.{name.partition('.')[2]}" in CERTIFICATE_NAMES
