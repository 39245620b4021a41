"""Types of settings that are more than a number or a text. Each raises ValueError for a value it does not accept."""

import base64
import binascii
import ipaddress
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from models.loading.specs import parse_spec


def split(value: object) -> object:
    """Split a text at its commas into a tuple; return any other value unchanged."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _check_weights(specs: tuple[str, ...]) -> tuple[str, ...]:
    for spec in specs:
        # Whether a single file has a base is checked where both settings are known.
        parse_spec(spec.rpartition("=")[2], base="demo")
    return specs


def _check_secret(secret: str) -> str:
    if secret and not _is_whsec(secret):
        raise ValueError("should be whsec_ followed by 24 to 64 bytes in base64")
    return secret


def _is_whsec(secret: str) -> bool:
    with suppress(binascii.Error):
        return secret.startswith("whsec_") and 24 <= len(base64.b64decode(secret[6:], validate=True)) <= 64
    return False


def _check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    for origin in origins:
        if not re.fullmatch(r"https?://[^/\s]+", origin):
            raise ValueError(f"{origin} should be scheme and host, such as https://app.example.com")
    return origins


def _check_hosts_or_networks(entries: tuple[str, ...]) -> tuple[str, ...]:
    for entry in entries:
        if re.fullmatch(r"[\w.\-]*[A-Za-z_][\w.\-]*", entry):
            continue
        try:
            ipaddress.ip_network(entry, strict=False)
        except ValueError:
            raise ValueError(f"{entry} should be a host, an address or a network, without scheme or port") from None
    return entries


def _check_networks(networks: tuple[str, ...]) -> tuple[str, ...]:
    for network in networks:
        ipaddress.ip_network(network, strict=False)
    return networks


def _check_rate(rate: str) -> str:
    if rate and not re.fullmatch(r"[1-9]\d{0,8} ?(/|per) ?([1-9]\d{0,4} ?)?(second|minute|hour|day)s?", rate):
        raise ValueError("should be a number and a time, such as 60/minute or 10 per 5 seconds")
    return rate


def _check_base_url(url: str) -> str:
    if url and not url.startswith(("http://", "https://")):
        raise ValueError("should start with http:// or https://")
    return url.rstrip("/")


def _check_directory(directory: Path | None) -> Path | None:
    if directory is not None and not directory.is_dir():
        raise ValueError("should be an existing directory")
    return directory


def _check_named_endpoints(entries: tuple[str, ...]) -> tuple[str, ...]:
    for entry in entries:
        if not re.fullmatch(r"[^=\s]+=[^=\s]+", entry):
            raise ValueError(f"{entry} should be NAME=ENDPOINT, such as gpt-image-1=fal-ai/flux/schnell")
    return entries


CommaSeparated = Annotated[tuple[str, ...], BeforeValidator(split)]
Weights = Annotated[CommaSeparated, AfterValidator(_check_weights)]
Origins = Annotated[CommaSeparated, AfterValidator(_check_origins)]
HostsOrNetworks = Annotated[CommaSeparated, AfterValidator(_check_hosts_or_networks)]
Networks = Annotated[CommaSeparated, AfterValidator(_check_networks)]
NamedEndpoints = Annotated[CommaSeparated, AfterValidator(_check_named_endpoints)]
WebhookSecret = Annotated[str, AfterValidator(_check_secret)]
Rate = Annotated[str, AfterValidator(_check_rate)]
BaseURL = Annotated[str, AfterValidator(_check_base_url)]
ExistingDirectory = Annotated[Path | None, AfterValidator(_check_directory)]
