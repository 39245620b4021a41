"""A generator of docs/settings.md from the settings themselves: `python -m tests.support.settings_page`."""

import re
from typing import Any

from server.cli.options import shown_default
from server.settings import PREFIX, Settings
from tests.support.server_process import ROOT

PAGE = ROOT / "docs" / "settings.md"

_HEAD = """\
# Settings

For operators: every setting of `flux-server serve`, with its default. You need this page when a default does not fit
your machine or your clients.

Set an option on the command line, or its variable in the environment; the command line wins. An empty variable counts
as not set. Separate several values of one variable with commas. If settings are wrong, the server does not start and
lists every problem. `flux-server serve --help` prints the same options.

The server reads its settings at its start. To change one, restart the server; there is no configuration file. Keys from
`flux-server keys` take effect at once.

The variable `FAL_KEY` counts as one of `--keys`, unless its value is `local`, which `flux-server env` gives to clients
of a server without keys.

| option | variable | default | description |
|---|---|---|---|
"""
_FOOT = (
    "\n`python -m tests.support.settings_page` writes this page from `server/settings.py`; a test compares the two.\n"
)

#: Sentences added to a description, most with a link to the page that explains the setting.
_NOTES = {
    "weights": "See [Weights and memory](weights-and-memory.md).",
    "tls_port": "fal's Python client needs HTTPS.",
    "proxy_port": "See [Clients](clients.md#the-connect-proxy).",
    "data_dir": "See [the data directory](operations.md#the-data-directory).",
    "keys": "See [Keys](operations.md#keys).",
    "trusted_proxies": "See [Behind a reverse proxy](deploy.md#behind-a-reverse-proxy).",
    "dtype": "See [Types on a CPU](weights-and-memory.md#types-on-a-cpu).",
    "memory": "See [Memory plans](weights-and-memory.md#memory-plans).",
    "max_acceleration": "See [Acceleration](weights-and-memory.md#acceleration).",
    "ray": "See [Many GPUs](cluster.md).",
    "max_side": "Requests without `image_size` ask for 1024x768.",
    "log_level": "One of `debug`, `info`, `warning` and `error`.",
    "outbound_allow": "For example `10.0.0.0/8,hooks.lan`.",
    "shutdown_grace": "Above 80, also raise `stop_grace_period` (Docker Compose) or `TimeoutStopSec` (systemd), 90 s.",
    "webhook_secret": "See [Webhooks](endpoints.md#webhooks).",
    "openai_models": "See [OpenAI's images API](clients.md#openais-images-api).",
    "testing": "See [Testing your application](testing-your-app.md).",
    "a1111": "See [AUTOMATIC1111's API](clients.md#automatic1111s-api).",
    "models_dir": "See [Adding an endpoint](adding-an-endpoint.md).",
}
#: Parts of a description that users type as they are; the page shows them as code.
_LITERAL = re.compile(
    r"--[a-z-]+|\bFAL_KEY\b|X-[A-Za-z-]+\*?|(?<= )/[a-z]+(?:\.json)?\b|\b[A-Z]+=[A-Z]+\b"
    r"|\d+(?:\.\d+){3}/\d+|whsec_\.{3}"
)


def page() -> str:
    """Return the text of docs/settings.md."""
    rows = (_row(name, field) for name, field in Settings.model_fields.items())
    return _HEAD + "".join(rows) + _FOOT


def _row(name: str, field: Any) -> str:
    description = _LITERAL.sub(r"`\g<0>`", field.description).replace("|", "\\|")
    cells = (_option(name, field), f"`{PREFIX}{name.upper()}`", _default(name))
    return f"| {' | '.join((*cells, ' '.join(filter(None, (description, _NOTES.get(name))))))} |\n"


def _option(name: str, field: Any) -> str:
    if name == "weights":
        return "`WEIGHTS…`"
    flag = name.replace("_", "-")
    return f"`--[no-]{flag}`" if field.annotation is bool else f"`--{flag}`"


def _default(name: str) -> str:
    # Two values read "ONE, else OTHER": the second applies where the first does not.
    values = shown_default(name).split(", else ")
    return ", else ".join(f"`{value}`" for value in values) if any(values) else "none"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
