"""A real nginx with the configuration of docs/nginx.conf, on free ports."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from server.net import tls
from tests.support.server_process import ROOT, Server, free_port

SAMPLE = ROOT / "docs" / "nginx.conf"
NAME = "flux.example.com"
#: nginx's main configuration file. It keeps nginx in the foreground and all files that nginx writes in one directory.
_MAIN = """
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log {directory}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    include {directory}/flux-server.conf;
}}
"""


@dataclass(frozen=True)
class Nginx:
    """A running nginx: its ports, the certificate authority that its clients trust, and its error log."""

    port: int
    plain_port: int
    authority: Path
    log: Path

    @property
    def errors(self) -> str:
        """The text of the error log."""
        return self.log.read_text()

    @property
    def url(self) -> str:
        """The HTTPS URL for clients."""
        return f"https://localhost:{self.port}"


def _configured(text: str, server: Server, nginx: Nginx, files: tls.CertificateFiles, name: str) -> str:
    """Return the sample with the names, ports and certificate of this test. Fail if the sample lacks one of them."""
    host = f"{name}:{nginx.port}"
    changes = {
        "127.0.0.1:8000": urlsplit(server.url).netloc,
        "listen 443": f"listen 127.0.0.1:{nginx.port}",
        "listen 80": f"listen 127.0.0.1:{nginx.plain_port}",
        f"/etc/letsencrypt/live/{NAME}/fullchain.pem": str(files.certificate),
        f"/etc/letsencrypt/live/{NAME}/privkey.pem": str(files.key),
        f"https://{NAME}": f"https://{host}",
        f"Host {NAME}": f"Host {host}",
        # Last, because some of the keys above contain the name too.
        f"server_name {NAME}": f"server_name {name}",
    }
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


@contextmanager
def run_nginx(directory: Path, server: Server, name: str = "localhost") -> Iterator[Nginx]:
    """Start nginx in front of a server, configured by the sample; skip the test if nginx is not installed."""
    # Debian installs nginx in /usr/sbin, which is on root's PATH only.
    executable = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if not executable:
        pytest.skip("nginx is not installed")
    directory.mkdir()
    files = tls.ensure_certificate(directory, "localhost", name)
    nginx = Nginx(free_port(), free_port(), files.authority, directory / "error.log")
    text = _configured(SAMPLE.read_text(encoding="utf-8"), server, nginx, files, name)
    (directory / "flux-server.conf").write_text(text, encoding="utf-8")
    # If root starts nginx, its workers would run as a user that may not read this directory, so run them as root.
    user = "user root;" if os.geteuid() == 0 else ""
    (directory / "nginx.conf").write_text(user + _MAIN.format(directory=directory), encoding="utf-8")
    command = [executable, "-e", str(directory / "error.log"), "-c", str(directory / "nginx.conf")]
    with subprocess.Popen(command) as process:
        try:
            while process.poll() is None and not _listens(nginx.port):
                continue
            yield nginx
        finally:
            process.terminate()
            process.wait(30)
    assert "[emerg]" not in nginx.errors


def _listens(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
