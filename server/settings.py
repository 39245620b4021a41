"""All settings, read once from environment variables and command-line options."""

import ipaddress
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.loading.memory_plans import allowed
from server.setting_types import (
    BaseURL,
    CommaSeparated,
    ExistingDirectory,
    HostsOrNetworks,
    NamedEndpoints,
    Networks,
    Origins,
    Rate,
    WebhookSecret,
    Weights,
)

PREFIX = "FLUX_SERVER_"
#: The key that clients of a server without keys send, because fal's SDKs refuse to run without a key.
OPEN_KEY = "local"
_SECRETS = ("keys", "operator_keys", "webhook_secret")


class SettingsError(Exception):
    """One or more invalid settings; the message lists all of them, one per line."""


def default_data_dir(environment: Mapping[str, str]) -> Path:
    """Return $XDG_DATA_HOME/flux-server; $XDG_DATA_HOME defaults to ~/.local/share."""
    home = environment.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "flux-server"


class Settings(BaseModel):
    """The operator's settings. `serve --help` and docs/settings.md list them in this order, with these descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Weights = Field(
        ("demo",),
        description="Weights to serve: demo, a Hugging Face id, a directory in diffusers layout, a safetensors or"
        " GGUF file (with --base), or ENDPOINT=WEIGHTS.",
    )
    base: str = Field(
        "",
        description="For weights in a single file: the Hugging Face id or directory that gives the text encoders,"
        " autoencoder and configurations that the file lacks, such as black-forest-labs/FLUX.1-dev.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port for plain HTTP; 0 picks a free one.")
    tls_port: int = Field(8443, ge=0, le=65535, description="Port for HTTPS; 0 turns it off.")
    proxy_port: int = Field(
        0, ge=0, le=65535, description="Loopback port of the CONNECT proxy, which old fal clients need; 0 turns it off."
    )
    proxy_others: bool = Field(False, description="Let the CONNECT proxy connect to hosts that are not fal's.")
    data_dir: Path = Field(description="Directory for the queue, images, uploads, LoRA files and certificates.")
    keys: CommaSeparated = Field(
        (), description="API keys, separated by commas; if set, clients must send a key. FAL_KEY counts as one."
    )
    operator_keys: CommaSeparated = Field(
        (),
        description="API keys that may also see /status.json and /metrics. If no operator key exists and --keys has"
        " exactly one key, that key may see them.",
    )
    public_url: BaseURL = Field(
        "", description="Base of URLs in responses to clients of fal's host names; the certificate covers its host."
    )
    trusted_proxies: Networks = Field(
        (), description="Proxies (addresses or networks) with trusted X-Forwarded-* headers; clients then need a key."
    )
    cors_origin: Origins = Field(
        (), description="Web origins that may use a server without keys, in addition to loopback and --public-url."
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="Device to generate on: auto, cuda or cpu.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Number type on a CPU: bfloat16, float32, or auto for the faster one that fits; GPUs use bfloat16.",
    )
    safety_checker: str = Field(
        "Falconsai/nsfw_image_detection",
        description="Hugging Face id or directory of the safety checker, for weights that include none.",
    )
    memory: Literal["auto", "resident", "int8", "fp8", "fp8-storage", "int4", "group-offload"] = Field(
        "auto",
        description="How to fit the weights into GPU memory: resident (all on the GPU), int8, fp8 or fp8-storage (8"
        " bits), int4 (4 bits), group-offload (most in main memory), or auto for the first of these that fits.",
    )
    quantize: Literal["auto", "none", "fp8", "int8", "int4"] = Field(
        "auto",
        description="Form to which weights are rounded when they are loaded: none, fp8, int8, int4, or auto for none"
        " where they fit and else as --memory auto chooses.",
    )
    kernels_allow: CommaSeparated = Field(
        (),
        description="Hugging Face ids of kernels, which are code from the hub that runs without a check, such as"
        " rootonchair/nunchaku-lite-kernels for weights of Nunchaku.",
    )
    max_acceleration: Literal["none", "regular", "high"] = Field(
        "high", description="Highest acceleration offered: none, regular or high; requests for more get this one."
    )
    max_loaded: int = Field(0, ge=0, description="Maximum sets of weights in memory, per GPU; 0: as many as fit.")
    eager: bool = Field(
        False,
        description="Compile nothing: slower on a GPU, but with acceleration none, images equal diffusers' bit for bit"
        " (unless --quantize rounds the weights).",
    )
    ray: str = Field(
        "",
        description="Ray cluster to generate on: local (start Ray on this machine), auto (this machine's cluster), or"
        " an address; empty: generate in the server's process.",
    )
    gpus: int = Field(0, ge=0, description="With --ray: fixed number of GPUs; 0: all GPUs, or as --max-gpus says.")
    min_gpus: int = Field(1, ge=0, description="With --ray and --max-gpus: number of GPUs to keep even when idle.")
    max_gpus: int = Field(
        0, ge=0, description="With --ray: maximum GPUs as the queue grows; 0: the number does not follow the queue."
    )
    step_deadline: float = Field(
        600, gt=0, description="Maximum seconds for one step; then the process exits, and its supervisor restarts it."
    )
    enforce_safety_checker: bool = Field(False, description="Check every image, even if a request disables the check.")
    embed_parameters: bool = Field(True, description="Write prompt, seed and steps into the image files.")
    max_running: int = Field(
        8,
        ge=1,
        le=64,
        description="Maximum concurrent requests of normal priority; with --ray, per GPU and at most 4. Requests of low"
        " priority start only while fewer requests than this maximum are running.",
    )
    max_queue_length: int = Field(100_000, ge=1, description="Maximum waiting requests; further ones get 429.")
    max_queue_length_per_key: int = Field(
        0, ge=0, description="Maximum waiting requests of one key; further ones get 429. 0: only --max-queue-length."
    )
    max_running_per_key: int = Field(
        0, ge=0, description="Maximum concurrent requests of one key; its further requests wait. 0: no limit."
    )
    rate_per_key: Rate = Field(
        "", description="Maximum rate per key, such as 60/minute, of requests and separately of uploads; more get 429."
    )
    max_side: int = Field(2048, ge=64, le=14142, description="Longest side of an image, in pixels.")
    max_pixels: int = Field(4_194_304, ge=4096, description="Largest area of an image, in pixels.")
    max_connections: int = Field(4096, ge=1, description="Maximum connections per port; further ones are closed.")
    max_body_mib: int = Field(
        40, ge=1, description="Largest request body, in MiB; bodies and responses in memory may take four times that."
    )
    max_upload_mib: int = Field(1024, ge=1, description="Largest uploaded file, in MiB.")
    max_uploads_gb: float = Field(
        8, gt=0, description="Maximum GB of one key's uploads; its unfinished requests' inputs may take as much again."
    )
    max_lora_mib: int = Field(1280, ge=1, description="Largest LoRA file, in MiB.")
    max_control_net_mib: int = Field(7168, ge=1, description="Largest file of a control net or an IP adapter, in MiB.")
    loras_gb: float = Field(
        10,
        gt=0,
        description="GB on disk for LoRAs, control nets and IP adapters; the least recently used are deleted first.",
    )
    retention_days: float = Field(7, gt=0, description="Days to keep results, images and uploads.")
    retention_gb: float = Field(
        10,
        gt=0,
        description="GB on disk for results and files; if exceeded, keys above an equal share lose their oldest ones.",
    )
    outbound_allow: HostsOrNetworks = Field(
        (), description="Private hosts and networks that webhooks and downloads may reach, in addition to public ones."
    )
    webhook_secret: WebhookSecret = Field(
        "", description="Secret, whsec_..., for an additional Standard Webhooks signature."
    )
    shutdown_grace: float = Field(30, ge=0, description="Seconds that running requests get to finish during a stop.")
    fal_price: float = Field(
        0,
        ge=0,
        allow_inf_nan=False,
        description="fal's price of a megapixel, in any currency: /status then shows what the same images would have"
        " cost there; 0: not shown.",
    )
    openai_models: NamedEndpoints = Field(
        (),
        description="Model names of OpenAI's API, as NAME=ENDPOINT. Names that start with gpt-image, chatgpt-image or"
        " dall-e stand for the default endpoint unless listed here.",
    )
    a1111: bool = Field(False, description="Serve the part of AUTOMATIC1111's API that Open WebUI calls.")
    models_dir: ExistingDirectory = Field(
        None, description="Directory of Python files with more models, run by the server."
    )
    testing: bool = Field(
        False,
        description="For an application's tests: respond to /testing (faults, recorded requests), keep the requests"
        " of each key apart, use free ports and a temporary data directory unless set otherwise, and on loopback let"
        " webhooks and downloads reach this machine. For serve and run.",
    )
    # Linux has no greater process ids.
    exit_with_process: int = Field(
        0, ge=0, le=2**22, description="Stop when the process with this id has ended; 0: never."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged.")
    log_format: Literal["text", "json"] = Field("text", description="Log format: text (coloured on terminals) or json.")

    @model_validator(mode="after")
    def _gpus_are_of_a_cluster(self) -> "Settings":
        if not self.ray and (self.gpus or self.max_gpus):
            raise ValueError("--gpus and --max-gpus need --ray")
        if self.ray and self.testing:
            raise ValueError("--testing cannot be used with --ray")
        if self.gpus and self.max_gpus:
            raise ValueError("use either --gpus for a fixed number of GPUs, or --max-gpus to scale with the queue")
        if "min_gpus" in self.model_fields_set and not self.max_gpus:
            raise ValueError("--min-gpus needs --max-gpus")
        if self.max_gpus and self.min_gpus > self.max_gpus:
            raise ValueError("--min-gpus should be at most --max-gpus")
        return self

    @model_validator(mode="after")
    def _proxy_needs_tls(self) -> "Settings":
        if self.proxy_port and not self.tls_port:
            raise ValueError("--proxy-port needs --tls-port, to which the CONNECT proxy forwards HTTPS")
        ports = [port for port in (self.port, self.tls_port, self.proxy_port) if port]
        if len(set(ports)) < len(ports):
            raise ValueError("--port, --tls-port and --proxy-port should differ")
        return self

    @model_validator(mode="after")
    def _a_plan_is_allowed(self) -> "Settings":
        allowed(self.memory, self.quantize)
        return self

    @property
    def is_reachable_remotely(self) -> bool:
        """Whether programs on other machines can reach the server, over the network or through a proxy."""
        return bool(self.trusted_proxies) or not self.is_loopback

    @property
    def has_automatic_key(self) -> bool:
        """Whether the automatic key is valid: the server is reachable remotely, and the settings contain no key."""
        return self.is_reachable_remotely and not (self.keys or self.operator_keys)

    @property
    def is_loopback(self) -> bool:
        """Whether the server listens on this machine only."""
        with suppress(ValueError):
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        return False

    @property
    def local_address(self) -> str:
        """The address at which programs on this machine reach the server."""
        if self.host in ("0.0.0.0", "localhost"):  # noqa: S104  compared, not bound
            return "127.0.0.1"
        return "::1" if self.host == "::" else self.host

    @classmethod
    def load(cls, environment: Mapping[str, str], options: Mapping[str, Any] | None = None) -> "Settings":
        """Load settings from FLUX_SERVER_*, overridden by `options`; add FAL_KEY to the keys. Raises SettingsError."""
        values: dict[str, Any] = {"data_dir": default_data_dir(environment)}
        # An empty variable counts as not set, as in .env files.
        given = {name: value for name, value in environment.items() if name.startswith(PREFIX) and value}
        values |= {name.removeprefix(PREFIX).lower(): value for name, value in given.items()}
        values.update({name: value for name, value in (options or {}).items() if value is not None})
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError("\n".join(_problem(entry) for entry in error.errors())) from None
        # `flux-server env` exports FAL_KEY=local for clients of a server without keys. The same shell may start the
        # server, so this value is no key. A server for tests ignores a developer's own key.
        if settings.testing or environment.get("FAL_KEY", OPEN_KEY) in ("", OPEN_KEY):
            return settings
        return settings.model_copy(update={"keys": (*settings.keys, environment["FAL_KEY"])})


def _problem(entry: Any) -> str:
    if not entry["loc"]:
        return str(entry["msg"]).removeprefix("Value error, ")
    name = str(entry["loc"][0])
    if entry["type"] == "extra_forbidden":
        return f"{PREFIX}{name.upper()}: unknown setting; `flux-server serve --help` lists all settings"
    text = ",".join(entry["input"]) if isinstance(entry["input"], tuple) else entry["input"]
    value = "" if name in _SECRETS else f"; the value is {str(text)!r}"
    option = "WEIGHTS" if name == "weights" else f"--{name.replace('_', '-')}"
    return f"{option} ({PREFIX}{name.upper()}): {entry['msg'].removeprefix('Value error, ')}{value}"
