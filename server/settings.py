"""Every setting, read once from a mapping that is passed in."""

import base64
import binascii
import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.loading.specs import parse_spec

PREFIX = "FLUX_SERVER_"
#: What clients send to a server that asks for no key: fal's SDKs insist on some.
OPEN_KEY = "local"
_SECRETS = ("keys", "webhook_secret")


class SettingsError(Exception):
    """One or more settings are wrong; the message lists them all, a line each."""


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


CommaSeparated = Annotated[tuple[str, ...], BeforeValidator(_split)]


def _default_data_dir(environment: Mapping[str, str]) -> Path:
    """$XDG_DATA_HOME/flux-server, or its usual place."""
    home = environment.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "flux-server"


class Settings(BaseModel):
    """What the operator chose. The order and the descriptions are those of `--help` and the README."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: CommaSeparated = Field(
        ("demo",), description="What to serve: demo, a hub id, a folder in diffusers layout, or ENDPOINT=FOLDER."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port for plain HTTP; 0 takes a free one.")
    tls_port: int = Field(8443, ge=0, le=65535, description="Port for HTTPS; 0 turns it off.")
    proxy_port: int = Field(
        0, ge=0, le=65535, description="Port of the CONNECT door, on loopback, for clients of any age; 0 turns it off."
    )
    proxy_others: bool = Field(False, description="Let the CONNECT door connect to hosts that are not fal's.")
    data_dir: Path = Field(description="Folder of the queue, the pictures and the certificates.")
    keys: CommaSeparated = Field(
        (), description="API keys clients must send, separated by commas; FAL_KEY counts as one."
    )
    operator_keys: CommaSeparated = Field(
        (), description="API keys that may see /status and /metrics too; the only one of --keys may anyway."
    )
    public_url: str = Field("", description="The base of URLs in answers to clients that reached us by a fal name.")
    trusted_proxies: CommaSeparated = Field(
        (), description="Addresses whose X-Forwarded-* headers are believed; with any, a key is asked for."
    )
    cors_origin: CommaSeparated = Field((), description="Web origins allowed beside loopback when there is no key.")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="Where to paint: auto, cuda or cpu.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Type of number on a CPU: bfloat16, float32, or auto for what it is fast at; a GPU takes bfloat16.",
    )
    safety_checker: str = Field(
        "Falconsai/nsfw_image_detection", description="Hub id or folder of the checker, if the weights bring none."
    )
    memory: Literal["auto", "resident", "fp8-storage", "group-offload"] = Field(
        "auto", description="How weights are placed: resident, fp8-storage, group-offload, or auto for what fits."
    )
    max_acceleration: Literal["none", "regular", "high"] = Field(
        "high", description="The highest acceleration offered: none, regular or high; requests for more get this."
    )
    max_loaded: int = Field(
        0, ge=0, description="How many sets of weights stay in memory at a time; 0: as many as fit."
    )
    eager: bool = Field(False, description="Compile nothing: slower on a GPU, bit for bit diffusers' own pipeline.")
    ray: str = Field(
        "", description="Paint on a Ray cluster: local, auto or its address; empty: in the server's own process."
    )
    gpus: int = Field(0, ge=0, description="With --ray: how many GPUs; 0: as many as the cluster has.")
    min_gpus: int = Field(1, ge=0, description="With --ray and --max-gpus: how many GPUs are kept, also idle.")
    max_gpus: int = Field(0, ge=0, description="With --ray: ask for GPUs as the queue grows, up to so many.")
    step_deadline: float = Field(
        600, gt=0, description="A step that takes longer, in seconds, ends the process, for its supervisor to restart."
    )
    enforce_safety_checker: bool = Field(False, description="Check every picture, whatever the request says.")
    embed_parameters: bool = Field(True, description="Write prompt, seed and steps into the picture files.")
    max_running: int = Field(
        8, ge=1, le=64, description="How many requests may be painted in turns; as many of low priority beside."
    )
    max_queue_length: int = Field(100_000, ge=1, description="How many requests may wait; more get 429.")
    max_queue_length_per_key: int = Field(
        0, ge=0, description="How many requests of one key may wait; more get 429. 0: as many as of all."
    )
    max_running_per_key: int = Field(
        0, ge=0, description="How many requests of one key are painted at a time; the others wait. 0: no limit."
    )
    rate_per_key: str = Field(
        "",
        description="How many requests, and beside them uploads, one key may send, such as 60/minute; more get 429.",
    )
    max_side: int = Field(2048, ge=64, le=14142, description="Longest side of a picture, in pixels.")
    max_pixels: int = Field(4_194_304, ge=4096, description="Largest area of a picture, in pixels.")
    max_connections: int = Field(4096, ge=1, description="How many connections a port holds; more are closed.")
    max_body_mib: int = Field(
        40, ge=1, description="Largest request body, in MiB; four times as much may be in memory on its way."
    )
    max_upload_mib: int = Field(1024, ge=1, description="Largest uploaded file, in MiB.")
    max_uploads_gb: float = Field(
        5, gt=0, description="How much one key may have uploaded, and its waiting requests bring, in GB."
    )
    max_lora_mib: int = Field(1024, ge=1, description="Largest LoRA file, in MiB.")
    loras_gb: float = Field(10, gt=0, description="How much disk LoRA files may take, in GB; the oldest go first.")
    retention_days: float = Field(7, gt=0, description="How long results and pictures are kept, in days.")
    retention_gb: float = Field(
        10,
        gt=0,
        description="How much disk results and files may take, in GB; who keeps most makes room, oldest first.",
    )
    outbound_allow: CommaSeparated = Field(
        (), description="Own hosts and networks that webhooks and downloads may reach, such as 10.0.0.0/8 or hooks.lan."
    )
    webhook_secret: str = Field("", description="Standard Webhooks' shared secret, whsec_..., if any.")
    shutdown_grace: float = Field(30, ge=0, description="How long a stop waits for running requests, in seconds.")
    models_dir: Path | None = Field(None, description="A folder with further model files, run as code.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much is logged.")
    log_format: Literal["text", "json"] = Field("text", description="How: text, in colour on a terminal, or json.")

    @field_validator("weights")
    @classmethod
    def _can_be_weights(cls, specs: tuple[str, ...]) -> tuple[str, ...]:
        for spec in specs:
            parse_spec(spec.rpartition("=")[2])
        return specs

    @field_validator("webhook_secret")
    @classmethod
    def _is_secret(cls, secret: str) -> str:
        if secret and not _is_whsec(secret):
            raise ValueError("should be whsec_ and 24 to 64 bytes in base64")
        return secret

    @field_validator("cors_origin")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"{origin} should be scheme and host, such as https://app.example.com")
        return origins

    @field_validator("outbound_allow")
    @classmethod
    def _are_hosts_or_networks(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            if re.fullmatch(r"[\w.\-]*[A-Za-z_][\w.\-]*", entry):
                continue
            try:
                ipaddress.ip_network(entry, strict=False)
            except ValueError:
                what = "a host, an address or a network, without scheme or port"
                raise ValueError(f"{entry} should be {what}") from None
        return entries

    @field_validator("rate_per_key")
    @classmethod
    def _is_rate(cls, rate: str) -> str:
        if rate and not re.fullmatch(r"[1-9]\d{0,8} ?(/|per) ?([1-9]\d{0,4} ?)?(second|minute|hour|day)s?", rate):
            raise ValueError("should be a number and a time, such as 60/minute or 10 per 5 seconds")
        return rate

    @field_validator("models_dir")
    @classmethod
    def _is_folder(cls, directory: Path | None) -> Path | None:
        if directory is not None and not directory.is_dir():
            raise ValueError("should be a folder")
        return directory

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ipaddress.ip_network(network, strict=False)
        return networks

    @model_validator(mode="after")
    def _gpus_are_of_a_cluster(self) -> "Settings":
        if not self.ray and (self.gpus or self.max_gpus):
            raise ValueError("--gpus and --max-gpus need --ray")
        if self.gpus and self.max_gpus:
            raise ValueError("either --gpus or --max-gpus: a fixed number, or as the queue grows")
        if "min_gpus" in self.model_fields_set and not self.max_gpus:
            raise ValueError("--min-gpus needs --max-gpus")
        if self.max_gpus and self.min_gpus > self.max_gpus:
            raise ValueError("--min-gpus should be at most --max-gpus")
        return self

    @model_validator(mode="after")
    def _door_needs_tls(self) -> "Settings":
        if self.proxy_port and not self.tls_port:
            raise ValueError("--proxy-port needs --tls-port: the door leads to it")
        ports = [port for port in (self.port, self.tls_port, self.proxy_port) if port]
        if len(set(ports)) < len(ports):
            raise ValueError("--port, --tls-port and --proxy-port should differ")
        return self

    @field_validator("public_url")
    @classmethod
    def _is_base(cls, url: str) -> str:
        if url and not url.startswith(("http://", "https://")):
            raise ValueError("should start with http:// or https://")
        return url.rstrip("/")

    @property
    def is_reachable_remotely(self) -> bool:
        """Whether others than this machine's programs can reach the server, by the network or through a proxy."""
        return bool(self.trusted_proxies) or not self.is_loopback

    @property
    def has_automatic_key(self) -> bool:
        """Whether the server makes a key of its own at the first start, because others can reach it and none is set."""
        return self.is_reachable_remotely and not (self.keys or self.operator_keys)

    @property
    def is_loopback(self) -> bool:
        """Whether it listens for this machine alone."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def local_address(self) -> str:
        """Where this machine itself finds the server."""
        if self.host in ("0.0.0.0", "localhost"):  # noqa: S104  compared, not bound
            return "127.0.0.1"
        return "::1" if self.host == "::" else self.host

    @classmethod
    def load(cls, environment: Mapping[str, str], options: Mapping[str, Any] | None = None) -> "Settings":
        """From FLUX_SERVER_* and FAL_KEY, with `options` on top. Raises SettingsError with every problem."""
        values: dict[str, Any] = {"data_dir": _default_data_dir(environment)}
        # An empty variable stands for none, as in .env files.
        values |= {
            name.removeprefix(PREFIX).lower(): value
            for name, value in environment.items()
            if name.startswith(PREFIX) and value
        }
        values.update({name: value for name, value in (options or {}).items() if value is not None})
        # "local" is what `env` gives clients of a server without keys, whose shell may start the server too.
        if environment.get("FAL_KEY", OPEN_KEY) not in ("", OPEN_KEY):
            values["keys"] = (*_words(values.get("keys", ())), environment["FAL_KEY"])
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError("\n".join(_problem(entry) for entry in error.errors())) from None


def _words(value: object) -> tuple[str, ...]:
    entries = _split(value)
    return tuple(entries) if isinstance(entries, tuple | list) else ()


def _problem(entry: Any) -> str:
    if not entry["loc"]:
        return str(entry["msg"]).removeprefix("Value error, ")
    name = str(entry["loc"][0])
    if entry["type"] == "extra_forbidden":
        return f"{PREFIX}{name.upper()}: there is no such setting"
    shown = ",".join(entry["input"]) if isinstance(entry["input"], tuple) else entry["input"]
    given = "" if name in _SECRETS else f"; given was {str(shown)!r}"
    option = "WEIGHTS" if name == "weights" else f"--{name.replace('_', '-')}"
    return f"{option} ({PREFIX}{name.upper()}): {entry['msg'].removeprefix('Value error, ')}{given}"


def _is_whsec(secret: str) -> bool:
    try:
        return secret.startswith("whsec_") and 24 <= len(base64.b64decode(secret[6:], validate=True)) <= 64
    except binascii.Error:
        return False
