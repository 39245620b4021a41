"""Configuration that points each SDK at this server: shell exports, and an environment for programs."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from server.net.client_variables import ADDRESS, DIRECT, base_url, client_key, host_of, variables
from server.net.fal_hosts import DOMAINS
from server.net.tls import CertificateFiles
from server.settings import OPEN_KEY, Settings

PRELOAD = Path(__file__).with_name("node_preload.cjs")

_LINES = """\
# Python: {python}
{exports}

# JavaScript, @fal-ai/client 1.10 or newer: call this first.
#   fal.config({{ {credentials}proxyUrl: {{ url: "{url}/api/fal/proxy", when: "always" }} }});

# JavaScript, @fal-ai/client before 1.10 and @fal-ai/serverless-client: call this first.
#   fal.config({{ credentials: "{key}", requestMiddleware: async (request) =>
#     ({{ ...request, url: "{url}/api/fal/proxy",
#       headers: {{ ...request.headers, "x-fal-target-url": request.url }} }}) }});

# Java, Kotlin, Swift, Dart: set the client's proxy URL.
#   {url}/api/fal/proxy

# Clients with a configurable base URL: {url} for synchronous runs, {url}/queue for the queue.
#   curl {url}/fal-ai/flux/dev {authorization}-H 'Content-Type: application/json' -d '{{"prompt": "a red apple"}}'"""

_BY_HOST = (
    "fal-client 0.11 or newer, and the package fal: set these variables.\n"
    "# Uploads and realtime still go to fal unless you set --proxy-port."
)
_BY_PROXY = (
    "fal-client of any version, including uploads and realtime: set these variables.\n"
    "# Until you unset them, this shell reaches other hosts only if the server runs with --proxy-others."
)
#: Proxy variables that some libraries prefer to the ones above.
_OTHER_PROXIES = ("ALL_PROXY", "SOCKS_PROXY")
#: Beginnings of the names of programs that `run` supports: Python with environment variables, Node with PRELOAD.
_PYTHON, _NODE = ("python", "uv", "pytest", "fal"), ("node", "npm", "npx", "yarn", "pnpm")
_OTHERS = "programs in other languages that this program starts"


def env_command(settings: Settings) -> str:
    """Return the `flux-server env` command for this server, with an option for each changed setting in ADDRESS."""
    settings = settings.model_copy(update={"data_dir": settings.data_dir.absolute()})
    defaults = Settings.load({"XDG_DATA_HOME": os.environ.get("XDG_DATA_HOME", "")})
    options = [
        f" --{name.replace('_', '-')} {shlex.quote(str(getattr(settings, name)))}"
        for name in ADDRESS
        if getattr(settings, name) != getattr(defaults, name)
    ]
    return f"{_program()} env{''.join(options)}"


def _program() -> str:
    """Return what starts this program in any shell and directory: its name if every shell finds it, else its path."""
    path = Path(sys.argv[0]).absolute()
    if path.name != "flux-server":
        return "flux-server"
    found = shutil.which(path.name)
    # uvx and active environments put their own directory into this process's PATH, but not into that of other shells.
    is_found = found and Path(found).samefile(path) and not Path(found).is_relative_to(sys.prefix)
    return path.name if is_found else shlex.quote(str(path))


def shell_exports(settings: Settings, files: CertificateFiles, *, needs_key: bool = False) -> str:
    """Build shell exports, with all other advice in comments, for `eval "$(flux-server env)"`.

    `needs_key` says whether the server requires a key that the settings do not contain.
    """
    url = base_url(settings)
    python = _BY_PROXY if settings.proxy_port else _BY_HOST
    if not settings.tls_port:
        python = "not available, because fal-client requires HTTPS and --tls-port is 0."
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables(settings, files).items()]
    if needs_key:
        note = "# FAL_KEY: this server requires a key; create one with flux-server keys add NAME"
        exports = [note if line.startswith("export FAL_KEY=") else line for line in exports]
    if settings.tls_port and not files.bundle.exists():
        exports.append("# (the server creates the certificate when it starts for the first time)")
    key = "your-key" if needs_key else client_key(settings)
    return _LINES.format(
        python=python,
        exports="\n".join(exports),
        url=url,
        key=key,
        credentials="" if key == OPEN_KEY else f'credentials: "{key}", ',
        authorization="" if key == OPEN_KEY else f"-H 'Authorization: Key {key}' ",
    )


def environment(settings: Settings, files: CertificateFiles, outside: Mapping[str, str]) -> dict[str, str]:
    """Return the environment `outside`, extended so that a Python or Node program's fal calls reach this server."""
    # Node accepts only double quotes in NODE_OPTIONS.
    preload = str(PRELOAD).replace("\\", "\\\\").replace('"', '\\"')
    options = f'{outside.get("NODE_OPTIONS", "")} --require "{preload}"'.strip()
    # The machine's proxy must see neither calls to this server nor calls that are redirected to it.
    no_proxy = outside.get("NO_PROXY") or outside.get("no_proxy")
    names = (*DOMAINS, *(f".{name}" for name in DOMAINS))
    direct = ",".join(filter(None, (no_proxy, DIRECT, host_of(settings), *names)))
    without_proxies = {name: value for name, value in outside.items() if name.upper() not in _OTHER_PROXIES}
    return {
        **(without_proxies if settings.proxy_port else outside),
        "NO_PROXY": direct,
        "no_proxy": direct,
        **variables(settings, files),
        "FAL_KEY": outside.get("FAL_KEY") or client_key(settings),
        "NODE_EXTRA_CA_CERTS": str(files.bundle),
        "NODE_OPTIONS": options,
        "FLUX_RUN_TARGET": ",".join((settings.local_address, str(settings.port), str(settings.tls_port), *DOMAINS)),
    }


class UnsupportedProgram(Exception):
    """A program that must not run, because its fal calls would go to the real cloud."""


def check_ports(settings: Settings, command: Sequence[str]) -> None:
    """Check that the server has the ports that `run` needs for this command. Raises UnsupportedProgram if not."""
    if not settings.tls_port:
        raise UnsupportedProgram("run needs --tls-port: without it, the program's calls would go to the real fal")
    if not settings.proxy_port and not _is_node(command):
        raise UnsupportedProgram(
            "run needs the server's --proxy-port for all programs except Node's: "
            "without it, their calls would go to the real fal"
        )


def check(settings: Settings, files: CertificateFiles, command: Sequence[str]) -> None:
    """Check that the ports and the certificate that `run` needs for this command exist.

    Raises UnsupportedProgram if something is missing. `run_limitations` names what `run` cannot do for a program.
    """
    check_ports(settings, command)
    if not files.bundle.exists():
        raise UnsupportedProgram(
            f"there is no certificate in {files.bundle.parent}; start the server once with "
            f"--data-dir {files.bundle.parent.parent}, or name the --data-dir of the server that runs"
        )


def run(settings: Settings, files: CertificateFiles, command: Sequence[str]) -> None:
    """Replace this process with the command, whose fal calls go to this server. Raises OSError if it cannot start."""
    os.execvpe(command[0], list(command), environment(settings, files, os.environ))  # noqa: S606  the user's command


def run_limitations(command: Sequence[str]) -> str:
    """Return a sentence for the user that says which calls of the command do not reach this server."""
    if _is_node(command):
        return f"{_OTHERS} still send their calls to the real fal."
    if not PurePath(command[0]).name.startswith(_PYTHON):
        return "run covers Python and Node. For other programs, set the client's proxy URL; see `flux-server env`."
    ignoring = "code that ignores proxy variables (aiohttp without trust_env=True, bare sockets)"
    return f"{ignoring}, and {_OTHERS}, still send their calls to the real fal."


def _is_node(command: Sequence[str]) -> bool:
    return PurePath(command[0]).name.startswith(_NODE)
