"""What points each SDK at this server."""

import shlex

from server.settings import Settings
from server.tls import TLS

_LINES = """\
# Python (fal-client 0.11 or newer, fal): these variables are all it takes.
{exports}

# JavaScript, @fal-ai/client 1.10 or newer: one line in front.
#   fal.config({{ proxyUrl: {{ url: "{url}/api/fal/proxy", when: "always" }} }});

# JavaScript, @fal-ai/client before 1.10 and @fal-ai/serverless-client: one line in front.
#   fal.config({{ credentials: "{key}", requestMiddleware: async (request) =>
#     ({{ ...request, url: "{url}/api/fal/proxy",
#       headers: {{ ...request.headers, "x-fal-target-url": request.url }} }}) }});

# Java, Kotlin, Swift, Dart: the client's proxy URL.
#   {url}/api/fal/proxy

# Anything that takes a base URL: {url} for synchronous runs, {url}/queue for the queue.
#   curl {url}/fal-ai/flux/dev -H 'Content-Type: application/json' -d '{{"prompt": "a red apple"}}'"""


def directions(settings: Settings, files: TLS) -> str:
    """Shell exports, and comments for what is not a variable: `eval "$(flux-server env)"` works."""
    host = "localhost" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104  compared, not bound
    host = f"[{host}]" if ":" in host else host
    key = settings.keys[0] if settings.keys else "local"
    url = settings.public_url or f"http://{host}:{settings.port}"
    return _LINES.format(exports=_exports(settings, files, host, key), url=url, key=key)


def _exports(settings: Settings, files: TLS, host: str, key: str) -> str:
    if not settings.tls_port:
        return "#   not available: fal-client speaks HTTPS only, and --tls-port is 0"
    tls_host = f"{'localhost' if settings.is_loopback else host}:{settings.tls_port}"
    variables = {
        "FAL_KEY": key,
        "FAL_RUN_HOST": tls_host,
        "FAL_QUEUE_RUN_HOST": f"{tls_host}/queue",
        "SSL_CERT_FILE": str(files.bundle),
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    if not files.bundle.exists():
        lines.append("# (the certificate is made when the server starts for the first time)")
    return "\n".join(lines)
