"""The environment variables that point Python clients and OpenAI's packages at this server."""

from urllib.parse import urlsplit

from server.net.tls import CertificateFiles
from server.settings import OPEN_KEY, Settings

#: Settings that clients need to find the server.
ADDRESS = ("data_dir", "host", "port", "tls_port", "proxy_port", "public_url")
#: Hosts that clients reach without a proxy, so that they download images directly.
DIRECT = "127.0.0.1,localhost"
#: Proxy variables. Each library reads some of them, in upper case or in lower case.
_PROXIES = [
    variable for name in ("HTTPS", "HTTP", "WSS", "WS") for variable in (f"{name}_PROXY", f"{name.lower()}_proxy")
]


def variables(settings: Settings, files: CertificateFiles) -> dict[str, str]:
    """Build the environment that points Python clients at this server; empty without a TLS port."""
    if not settings.tls_port:
        return {}
    # requests reads REQUESTS_CA_BUNDLE, the other libraries SSL_CERT_FILE.
    bundle = str(files.bundle)
    shared = {"FAL_KEY": client_key(settings), "SSL_CERT_FILE": bundle, "REQUESTS_CA_BUNDLE": bundle}
    if settings.proxy_port:
        proxy = f"http://127.0.0.1:{settings.proxy_port}"
        hosts = (host_of(settings), urlsplit(settings.public_url).hostname)
        direct = ",".join(dict.fromkeys((*DIRECT.split(","), *filter(None, hosts))))
        return {**shared, **dict.fromkeys(_PROXIES, proxy), "NO_PROXY": direct, "no_proxy": direct}
    public = urlsplit(settings.public_url)
    host = f"{'localhost' if settings.is_loopback else host_of(settings)}:{settings.tls_port}"
    if public.scheme == "https" and not public.path:
        # Clients on other machines need this name. The certificate covers it.
        host = public.netloc
    return {**shared, "FAL_RUN_HOST": host, "FAL_QUEUE_RUN_HOST": f"{host}/queue"}


def testing_variables(settings: Settings, files: CertificateFiles) -> dict[str, str]:
    """Build the environment for an application's tests: fal's clients, OpenAI's, and the URL of the controls.

    Without loopback, the CONNECT proxy is left out, because clients on other machines cannot reach it.
    """
    url = base_url(settings)
    reachable = settings if settings.is_loopback else settings.model_copy(update={"proxy_port": 0})
    key = client_key(settings)
    openai = {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": key}
    return {"FAL_KEY": key, **variables(reachable, files), **openai, "FAL_SERVER_URL": url}


def base_url(settings: Settings) -> str:
    """Return the URL at which clients reach this server."""
    return settings.public_url or f"http://{host_of(settings)}:{settings.port}"


def host_of(settings: Settings) -> str:
    """Return the host name or address under which clients reach the server."""
    host = "localhost" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104  compared, not bound
    return f"[{host}]" if ":" in host else host


def client_key(settings: Settings) -> str:
    """Return a key that the server accepts, or words in its place if only the first start showed it."""
    if settings.keys:
        return settings.keys[0]
    return "the-key-shown-at-the-first-start" if settings.is_reachable_remotely else OPEN_KEY
