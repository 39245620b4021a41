"""What points each SDK at this server: lines to read, and variables to run a program in."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from urllib.parse import urlsplit

from server.net.fal_hosts import DOMAINS
from server.net.tls import CertificateFiles
from server.settings import OPEN_KEY, Settings

PRELOAD = Path(__file__).with_name("node_preload.cjs")

_LINES = """\
# Python: {python}
{exports}

# JavaScript, @fal-ai/client 1.10 or newer: one line in front.
#   fal.config({{ {credentials}proxyUrl: {{ url: "{url}/api/fal/proxy", when: "always" }} }});

# JavaScript, @fal-ai/client before 1.10 and @fal-ai/serverless-client: one line in front.
#   fal.config({{ credentials: "{key}", requestMiddleware: async (request) =>
#     ({{ ...request, url: "{url}/api/fal/proxy",
#       headers: {{ ...request.headers, "x-fal-target-url": request.url }} }}) }});

# Java, Kotlin, Swift, Dart: the client's proxy URL.
#   {url}/api/fal/proxy

# Anything that takes a base URL: {url} for synchronous runs, {url}/queue for the queue.
#   curl {url}/fal-ai/flux/dev {authorization}-H 'Content-Type: application/json' -d '{{"prompt": "a red apple"}}'"""

_BY_HOST = (
    "fal-client 0.11 or newer, and fal: these variables are all it takes,\n"
    "# but for uploads and realtime, which still go to fal: --proxy-port brings those here too."
)
_BY_DOOR = "fal-client of any age, whole: these variables are all it takes."
_DIRECT = "127.0.0.1,localhost"
#: Each library reads one of them, in one of both spellings; images come from this server without a proxy.
_PROXIES = [spelt for name in ("HTTPS", "HTTP", "WSS", "WS") for spelt in (f"{name}_PROXY", f"{name.lower()}_proxy")]
#: Those that some libraries prefer to these.
_OTHER_PROXIES = ("ALL_PROXY", "SOCKS_PROXY")
#: Programs that `run` brings here: Python through its variables, Node through the preload.
_PYTHON, _NODE = ("python", "uv", "pytest", "fal"), ("node", "npm", "npx", "yarn", "pnpm")
_OTHERS = "programs in other languages that it starts"


def shell_exports(settings: Settings, files: CertificateFiles, *, lacks_key: bool = False) -> str:
    """Shell exports, and comments for what is not a variable: `eval "$(flux-server env)"` works.

    With `lacks_key` the server wants a key, and none is known here.
    """
    host = _host(settings)
    url = settings.public_url or f"http://{host}:{settings.port}"
    python = _BY_DOOR if settings.proxy_port else _BY_HOST
    if not settings.tls_port:
        python = "not available, because fal-client speaks HTTPS only and --tls-port is 0."
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables(settings, files).items()]
    if lacks_key:
        note = "# FAL_KEY: this server wants a key that it knows; flux-server keys add NAME makes one"
        exports = [note if line.startswith("export FAL_KEY=") else line for line in exports]
    if settings.tls_port and not files.bundle.exists():
        exports.append("# (the certificate is made when the server starts for the first time)")
    key = "your-key" if lacks_key else _key(settings)
    return _LINES.format(
        python=python,
        exports="\n".join(exports),
        url=url,
        key=key,
        credentials="" if key == OPEN_KEY else f'credentials: "{key}", ',
        authorization="" if key == OPEN_KEY else f"-H 'Authorization: Key {key}' ",
    )


def variables(settings: Settings, files: CertificateFiles) -> dict[str, str]:
    """The environment that brings Python's clients here; empty when there is no TLS port."""
    if not settings.tls_port:
        return {}
    # requests reads a variable of its own.
    bundle = str(files.bundle)
    shared = {"FAL_KEY": _key(settings), "SSL_CERT_FILE": bundle, "REQUESTS_CA_BUNDLE": bundle}
    if settings.proxy_port:
        proxy = f"http://127.0.0.1:{settings.proxy_port}"
        own = (_host(settings), urlsplit(settings.public_url).hostname)
        direct = ",".join(dict.fromkeys((*_DIRECT.split(","), *filter(None, own))))
        return {**shared, **dict.fromkeys(_PROXIES, proxy), "NO_PROXY": direct, "no_proxy": direct}
    host = f"{'localhost' if settings.is_loopback else _host(settings)}:{settings.tls_port}"
    return {**shared, "FAL_RUN_HOST": host, "FAL_QUEUE_RUN_HOST": f"{host}/queue"}


def environment(settings: Settings, files: CertificateFiles, outside: Mapping[str, str]) -> dict[str, str]:
    """`outside` with everything that brings a Python or Node program's fal calls here."""
    # Quoted for Node, which knows double quotes alone.
    preload = str(PRELOAD).replace("\\", "\\\\").replace('"', '\\"')
    options = f'{outside.get("NODE_OPTIONS", "")} --require "{preload}"'.strip()
    # The machine's own proxy has no business with what is here, nor with what is led here.
    told, names = outside.get("NO_PROXY") or outside.get("no_proxy"), (*DOMAINS, *(f".{name}" for name in DOMAINS))
    direct = ",".join(filter(None, (told, _DIRECT, _host(settings), *names)))
    passed = {name: value for name, value in outside.items() if name.upper() not in _OTHER_PROXIES}
    return {
        **(passed if settings.proxy_port else outside),
        "NO_PROXY": direct,
        "no_proxy": direct,
        **variables(settings, files),
        "FAL_KEY": outside.get("FAL_KEY") or _key(settings),
        "NODE_EXTRA_CA_CERTS": str(files.bundle),
        "NODE_OPTIONS": options,
        "FLUX_RUN_TARGET": ",".join((settings.local_address, str(settings.port), str(settings.tls_port), *DOMAINS)),
    }


class UnsupportedProgram(Exception):
    """A program's calls cannot be brought here, so it must not run: they would go to the real cloud."""


def check(settings: Settings, files: CertificateFiles, command: Sequence[str]) -> None:
    """Raises UnsupportedProgram where calls of this command would go to the real cloud."""
    if not settings.tls_port:
        raise UnsupportedProgram("run needs --tls-port: without it the program's calls would go to the real cloud")
    if not settings.proxy_port and not _is_node(command):
        raise UnsupportedProgram(
            "run needs --proxy-port for all programs but Node's, as the server does: "
            "without it their calls would go to the real cloud"
        )
    if not files.bundle.exists():
        raise UnsupportedProgram(
            f"there is no certificate in {files.bundle.parent}; start the server once with this --data-dir"
        )


def run(settings: Settings, files: CertificateFiles, command: Sequence[str]) -> None:
    """Become the command, with its fal calls brought here. Raises OSError when there is no such command."""
    os.execvpe(command[0], list(command), environment(settings, files, os.environ))  # noqa: S606  what was asked for


def run_limitations(command: Sequence[str]) -> str:
    """What to tell of before the command runs."""
    if _is_node(command):
        return f"not led here: {_OTHERS}."
    if not PurePath(command[0]).name.startswith(_PYTHON):
        return "run covers Python and Node; other programs need their client's proxy URL, see `flux-server env`."
    return f"not led here: what ignores proxy variables (aiohttp without trust_env=True, bare sockets), {_OTHERS}."


def _is_node(command: Sequence[str]) -> bool:
    return PurePath(command[0]).name.startswith(_NODE)


def _host(settings: Settings) -> str:
    host = "localhost" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104  compared, not bound
    return f"[{host}]" if ":" in host else host


def _key(settings: Settings) -> str:
    if settings.keys:
        return settings.keys[0]
    return "the-key-shown-at-the-first-start" if settings.is_reachable_remotely else OPEN_KEY
