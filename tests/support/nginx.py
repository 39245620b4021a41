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
#: Of nginx's own main file: what is asked for here and not by a distribution.
_MAIN = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/flux-server.conf;
}}
"""


@dataclass(frozen=True)
class Nginx:
    """One that runs: its ports, and the authority that its clients trust."""

    port: int
    plain_port: int
    authority: Path
    log: Path

    @property
    def errors(self) -> str:
        """What it complained of."""
        return self.log.read_text()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"https://localhost:{self.port}"


def _changed(text: str, server: Server, nginx: Nginx, files: tls.CertificateFiles, name: str) -> str:
    """The sample with another name, other ports, and a certificate of this machine; each of these is in it."""
    host = f"{name}:{nginx.port}"
    changes = {
        "127.0.0.1:8000": urlsplit(server.url).netloc,
        "listen 443": f"listen 127.0.0.1:{nginx.port}",
        "listen 80": f"listen 127.0.0.1:{nginx.plain_port}",
        f"/etc/letsencrypt/live/{NAME}/fullchain.pem": str(files.certificate),
        f"/etc/letsencrypt/live/{NAME}/privkey.pem": str(files.key),
        f"https://{NAME}": f"https://{host}",
        f"Host {NAME}": f"Host {host}",
        # Last, for it is in some of the others.
        f"server_name {NAME}": f"server_name {name}",
    }
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


@contextmanager
def proxied(folder: Path, server: Server, name: str = "localhost") -> Iterator[Nginx]:
    """An nginx in front of a server, as the sample has it; skips where there is none."""
    # Debian has it where only root looks.
    found = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if not found:
        pytest.skip("there is no nginx")
    folder.mkdir()
    files = tls.ensure_certificate(folder, "localhost", name)
    nginx = Nginx(free_port(), free_port(), files.authority, folder / "error.log")
    text = _changed(SAMPLE.read_text(encoding="utf-8"), server, nginx, files, name)
    (folder / "flux-server.conf").write_text(text, encoding="utf-8")
    # Its workers would be somebody else, who may not see this folder.
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(user + _MAIN.format(folder=folder), encoding="utf-8")
    command = [found, "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
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
