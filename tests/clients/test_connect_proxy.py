"""Tests of the CONNECT proxy: old and new fal-clients need only environment variables, and reach no other host."""

import asyncio
import hashlib
import io
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from server.net import connect_proxy, tls
from server.net.connect_proxy import ConnectProxy
from server.net.fal_hosts import CERTIFICATE_NAMES, Role, role_of
from server.settings import Settings, SettingsError
from tests.support.connect_clients import (
    VERSIONS,
    client_directory,
    client_output,
    recorded_hosts,
    recording_environment,
    run_client,
)
from tests.support.python_client import download_image, env_variables
from tests.support.server_process import ROOT, TEST_MODELS, Server, free_port, serving, serving_with_proxy

PART_BYTES = 10 * 2**20
#: Over 100 MiB, the size from which fal-client uploads in parts.
LARGE_BYTES = 101 * 2**20
END_OF_HEAD = b"\r\n\r\n"

every_version = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture(scope="session")
def upload_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a small image and a large sparse file. Each part of the file starts with another byte."""
    directory = tmp_path_factory.mktemp("uploads")
    Image.new("RGB", (8, 8), (200, 30, 30)).save(directory / "small.png")
    with (directory / "large.bin").open("wb") as file:
        file.truncate(LARGE_BYTES)
        for number in range(LARGE_BYTES // PART_BYTES + 1):
            file.seek(number * PART_BYTES)
            file.write(bytes([number + 1]))
    return directory


def test_the_variables_printed(proxy_server: Server) -> None:
    printed = env_variables(proxy_server)
    proxy = f"http://127.0.0.1:{proxy_server.settings['PROXY_PORT']}"
    shared = {"FAL_KEY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"}
    names = [f"{scheme}_PROXY" for scheme in ("HTTPS", "HTTP", "WSS", "WS")]
    proxies = {*names, *(name.lower() for name in names)}
    assert set(printed) == {*shared, *proxies, "NO_PROXY", "no_proxy"}
    assert {printed[name] for name in proxies} == {proxy}
    assert {"127.0.0.1", "localhost"} == set(printed["NO_PROXY"].split(","))


@every_version
def test_client_version(proxy_server: Server, version: str) -> None:
    reported_version, package_dir = client_output(proxy_server, version, "version")
    assert reported_version == version
    assert client_directory(version) in (None, Path(package_dir).parent)


@every_version
def test_every_call_gives_the_same_image(proxy_server: Server, version: str) -> None:
    results = client_output(proxy_server, version, "everyday")
    answers = [results["run"], results["submit"], results["subscribe"], results["stream"][-1], results["result"]]
    assert len({download_image(answer) for answer in answers}) == 1
    assert {answer["seed"] for answer in answers} == {7}
    assert results["events"][-1]["type"] == results["status"]["type"] == "Completed"
    assert [line["message"] for line in results["events"][-1]["logs"]] == [f"step {step}/4" for step in (1, 2, 3, 4)]


def test_every_async_call_gives_the_same_image(proxy_server: Server) -> None:
    results = client_output(proxy_server, VERSIONS[0], "everyday_async")
    assert len({download_image(results[call]) for call in ("run", "submit", "subscribe", "result")}) == 1


@every_version
def test_uploads(proxy_server: Server, version: str, upload_dir: Path) -> None:
    process = run_client(proxy_server, version, "uploads", str(upload_dir))
    # If its first upload route fails, the newest client falls back to another, which would hide the failure.
    assert "falling back" not in process.stderr
    urls = json.loads(process.stdout)
    with httpx.Client(trust_env=False) as client:
        assert client.get(urls["text"]).content == b"hello"
        assert client.get(urls["small"]).content == (upload_dir / "small.png").read_bytes()
        with Image.open(io.BytesIO(client.get(urls["image"]).content)) as image:
            assert (image.format, image.getpixel((0, 0))) == ("PNG", (200, 30, 30))
    assert digest_at(urls["large"]) == hashlib.sha256((upload_dir / "large.bin").read_bytes()).hexdigest()


def digest_at(url: str) -> str:
    """Return the SHA-256 of the file at this URL, read in chunks."""
    digest = hashlib.sha256()
    with httpx.stream("GET", url, trust_env=False) as response:
        for chunk in response.iter_bytes(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@every_version
def test_async_uploads(proxy_server: Server, version: str, upload_dir: Path) -> None:
    process = run_client(proxy_server, version, "uploads_async", str(upload_dir))
    assert "falling back" not in process.stderr
    urls = json.loads(process.stdout)
    assert httpx.get(urls["text"], trust_env=False).content == b"hello"
    assert httpx.get(urls["small"], trust_env=False).content == (upload_dir / "small.png").read_bytes()


@pytest.mark.parametrize("kind", ["realtime", "realtime_async"])
def test_realtime(proxy_server: Server, kind: str) -> None:
    first, refused, *others = client_output(proxy_server, VERSIONS[0], kind)
    assert len({download_image(answer) for answer in (first, *others)}) == 1
    assert (first["seed"], first["prompt"], first["has_nsfw_concepts"]) == (7, "a red apple", [False])
    assert (refused["type"], refused["error"]) == ("x-fal-error", "INVALID_INPUT")
    assert "prompt" in refused["reason"]


@pytest.fixture(scope="module")
def stopped_server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Start a server with its CONNECT proxy, then stop it; return the stopped server."""
    with serving_with_proxy(tmp_path_factory.mktemp("stopped"), TEST_MODELS) as server:
        env_variables(server)
        assert server.stop() == 0
    return server


@every_version
def test_clients_connect_nowhere_else_when_the_server_is_stopped(
    stopped_server: Server, version: str, upload_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "notes"
    failures = client_output(stopped_server, version, "hopeless", str(upload_dir), **recording_environment(log))
    assert None not in failures.values()
    assert recorded_hosts(log) == {"127.0.0.1"}


def test_the_canary_records_connections_to_other_hosts(stopped_server: Server, tmp_path: Path) -> None:
    log = tmp_path / "notes"
    variables = {**recording_environment(log), "HTTPS_PROXY": "http://127.0.0.2:9", "https_proxy": "http://127.0.0.2:9"}
    assert client_output(stopped_server, "0.7.0", "hopeless", str(tmp_path), **variables)["run"]
    assert "127.0.0.2" in recorded_hosts(log)


@contextmanager
def open_tunnel(server: Server, name: str, port: int = 443) -> Iterator[tuple[socket.socket, bytes]]:
    """Open a connection through a server's CONNECT proxy. Yield the connection and the head of the response."""
    with socket.create_connection(("127.0.0.1", int(server.settings["PROXY_PORT"])), 30) as plain:
        plain.sendall(f"CONNECT {name}:{port} HTTP/1.1\r\nhost: {name}:{port}".encode() + END_OF_HEAD)
        yield plain, head(plain)


def head(plain: socket.socket) -> bytes:
    """Return the bytes up to the empty line after the head, or up to the end of the connection."""
    received = b""
    while not received.endswith(END_OF_HEAD) and (byte := plain.recv(1)):
        received += byte
    return received


def send_raw(port: int, sent: bytes) -> bytes:
    """Send bytes to the proxy at this port and return all that it answers before it closes, which may be nothing."""
    received = b""
    # The proxy closes with unread input when it refuses a flood. The client sees a reset connection.
    with suppress(ConnectionResetError, BrokenPipeError), socket.create_connection(("127.0.0.1", port), 30) as plain:
        plain.sendall(sent)
        while chunk := plain.recv(65_536):
            received += chunk
    return received


#: The names of the certificate, with a label in place of each wildcard.
FAL_NAMES = [name.replace("*", "anything") for name in CERTIFICATE_NAMES]


@pytest.mark.parametrize("name", [*FAL_NAMES, "FAL.RUN", "fal.run.", "Queue.Fal.Run."])
def test_every_fal_host_leads_to_this_server(proxy_server: Server, name: str) -> None:
    trusted = ssl.create_default_context(cafile=str(proxy_server.data_dir / "tls" / "ca.pem"))
    hostname = name.lower().rstrip(".")
    with (
        open_tunnel(proxy_server, name) as (plain, answer),
        trusted.wrap_socket(plain, server_hostname=hostname) as secure,
    ):
        assert answer.startswith(b"HTTP/1.1 200 ")
        secure.sendall(f"GET /health HTTP/1.1\r\nhost: {hostname}\r\nconnection: close".encode() + END_OF_HEAD)
        is_offered = role_of(hostname) in (Role.RUN, Role.QUEUE, Role.REST)
        assert head(secure).startswith(b"HTTP/1.1 200 " if is_offered else b"HTTP/1.1 404 ")


OTHER_HOSTS = [
    "example.com",
    "notfal.ai",
    "fal.ai.example.com",
    "ai",
    "fal.run.example.com",
    "evilfal.run",
    "127.0.0.1",
    "localhost",
    "[::1]",
]


@pytest.mark.parametrize("name", OTHER_HOSTS)
def test_other_hosts_are_refused(proxy_server: Server, name: str) -> None:
    port = int(proxy_server.settings["PROXY_PORT"])
    answer = send_raw(port, f"CONNECT {name}:443 HTTP/1.1".encode() + END_OF_HEAD)
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"--proxy-others" in answer


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET https://example.com/ HTTP/1.1\r\nhost: example.com", 405),
        (b"GET http:///health HTTP/1.1", 405),
        (b"GET http://fal.run:99999/health HTTP/1.1", 400),
        (b"GET http://example.com/ HTTP/1.1\r\nhost: example.com", 403),
        (b"GET http://fal.run@example.com/ HTTP/1.1", 405),
        (b"GET / HTTP/1.1", 405),
        (b"CONNECT fal.run HTTP/1.1", 400),
        (b"CONNECT fal.run: HTTP/1.1", 400),
        (b"CONNECT fal.run:https HTTP/1.1", 400),
        (b"CONNECT", 400),
        (b"", 405),
        (b"\x16\x03\x01\xff\xfe", 405),
        (b"connect fal.run:443 HTTP/1.1", 405),
    ],
)
def test_invalid_requests_are_refused(proxy_server: Server, line: bytes, status: int) -> None:
    assert send_raw(int(proxy_server.settings["PROXY_PORT"]), line + END_OF_HEAD).startswith(
        f"HTTP/1.1 {status} ".encode()
    )


@pytest.mark.parametrize(
    "target", ["https://fal.run", "http://fal.run", "HTTP://Fal.Run:80", "http://fal.run.", "http://fal.run:8000"]
)
def test_an_absolute_url_at_a_fal_host_is_answered(proxy_server: Server, target: str) -> None:
    sent = f"GET {target}/health HTTP/1.1\r\nhost: fal.run\r\nproxy-connection: keep-alive".encode() + END_OF_HEAD
    answer = send_raw(int(proxy_server.settings["PROXY_PORT"]), sent)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"alive"' in answer


def test_a_request_with_an_absolute_url_keeps_its_body(proxy_server: Server) -> None:
    body = b'{"prompt": "plain"}'
    line = "POST http://fal.run/test/null HTTP/1.1\r\nhost: fal.run\r\ncontent-type: application/json"
    sent = f"{line}\r\ncontent-length: {len(body)}".encode() + END_OF_HEAD + body
    assert b'"prompt":"plain"' in send_raw(int(proxy_server.settings["PROXY_PORT"]), sent)


def test_a_tunnel_to_port_80_is_plain_http(proxy_server: Server) -> None:
    with open_tunnel(proxy_server, "queue.fal.run", 80) as (plain, answer):
        assert answer.startswith(b"HTTP/1.1 200 ")
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: queue.fal.run\r\nconnection: close" + END_OF_HEAD)
        assert head(plain).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("name", ["a.b.c.fal.ai", "a.b.fal.run"])
def test_a_host_outside_the_certificate_is_refused(proxy_server: Server, name: str) -> None:
    answer = send_raw(int(proxy_server.settings["PROXY_PORT"]), f"CONNECT {name}:443 HTTP/1.1".encode() + END_OF_HEAD)
    assert answer.startswith(b"HTTP/1.1 403 Not offered by this server")


@pytest.mark.parametrize("sent", [b"x" * 100_000, b"CONNECT fal.run:443 HTTP/1.1\r\n" + b"x: y\r\n" * 20_000])
def test_an_oversized_request_head_is_refused(proxy_server: Server, sent: bytes) -> None:
    assert b" 200 " not in send_raw(int(proxy_server.settings["PROXY_PORT"]), sent)
    assert_accepts_clients(proxy_server)


@pytest.mark.parametrize("target", ["fal.run:" + "1" * 5000, "fal.run:443:443", ":443", "a..b:443", "\udcff:443"])
def test_malformed_targets_are_refused(proxy_server: Server, target: str) -> None:
    sent, before = (
        b"CONNECT " + target.encode("utf-8", "surrogateescape") + b" HTTP/1.1" + END_OF_HEAD,
        len(proxy_server.output),
    )
    assert send_raw(int(proxy_server.settings["PROXY_PORT"]), sent).startswith(b"HTTP/1.1 4")
    assert "Traceback" not in proxy_server.output[before:]


def assert_accepts_clients(proxy_server: Server) -> None:
    """Check that the proxy still accepts other clients."""
    with open_tunnel(proxy_server, "fal.run") as (_, answer):
        assert answer.startswith(b"HTTP/1.1 200 ")


def test_an_incomplete_request_head_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect_proxy, "_HEAD_TIMEOUT", 0.05)

    async def send_half_a_head() -> bytes:
        port = free_port()
        proxy = ConnectProxy("127.0.0.1", 1, 2, allow_any_host=False)
        await proxy.open("127.0.0.1", port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"CONNECT fal.run:443 HTTP/1.1\r\n")
        answer = await reader.read()
        writer.close()
        await proxy.close()
        return answer

    assert asyncio.run(send_half_a_head()).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_disconnects_early_affects_no_other_client(proxy_server: Server) -> None:
    with socket.create_connection(("127.0.0.1", int(proxy_server.settings["PROXY_PORT"]))) as plain:
        plain.sendall(b"CONNECT fal.run:443 HT")
    with open_tunnel(proxy_server, "fal.run") as (plain, _):
        plain.sendall(b"\x16\x03\x01")
    assert_accepts_clients(proxy_server)


def test_shutdown_closes_open_tunnels(tmp_path: Path) -> None:
    with serving_with_proxy(tmp_path, TEST_MODELS) as server, open_tunnel(server, "fal.run") as (plain, _):
        assert server.stop() == 0
        assert "Traceback" not in server.output
        with suppress(ConnectionError):
            assert plain.recv(1) == b""


@contextmanager
def tls_host(directory: Path) -> Iterator[tuple[int, ssl.SSLContext]]:
    """Run a TLS server that is not fal's and says hello to one client. Yield its port and a context that trusts it."""
    files = tls.ensure_certificate(directory, "127.0.0.1")
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(files.certificate, files.key)

    def serve() -> None:
        accepted, _ = listener.accept()
        with accepted, server_context.wrap_socket(accepted, server_side=True) as secure:
            secure.recv(65_536)
            secure.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], ssl.create_default_context(cafile=str(files.authority))
        thread.join()


@pytest.fixture(scope="module")
def open_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server whose CONNECT proxy allows other hosts."""
    with serving_with_proxy(tmp_path_factory.mktemp("generous"), TEST_MODELS, proxy_others="true") as server:
        yield server


def test_proxy_others_allows_other_hosts(open_proxy: Server, tmp_path: Path) -> None:
    proxy = f"http://127.0.0.1:{open_proxy.settings['PROXY_PORT']}"
    with tls_host(tmp_path) as (port, trusted), httpx.Client(proxy=proxy, verify=trusted) as client:
        assert client.get(f"https://localhost:{port}/").text == "hello"
    with open_tunnel(open_proxy, "fal.run") as (_, answer):
        assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("target", ["localhost:{}", "localhost:99999999", "no.such.host.invalid:443", "a..b:443", ":1"])
def test_unreachable_other_hosts_are_refused(open_proxy: Server, target: str) -> None:
    sent, before = f"CONNECT {target.format(free_port())} HTTP/1.1".encode() + END_OF_HEAD, len(open_proxy.output)
    assert send_raw(int(open_proxy.settings["PROXY_PORT"]), sent).startswith((b"HTTP/1.1 502 ", b"HTTP/1.1 4"))
    assert "Traceback" not in open_proxy.output[before:]


def test_proxy_port_without_tls_port_is_a_settings_error(tmp_path: Path) -> None:
    environment = {"FLUX_SERVER_PROXY_PORT": "8888", "FLUX_SERVER_TLS_PORT": "0"}
    with pytest.raises(SettingsError, match="--proxy-port needs --tls-port"):
        Settings.load(environment)
    command = [sys.executable, "-m", "server", "serve", "--proxy-port", "8888", "--tls-port", "0"]
    process = subprocess.run(
        [*command, "--data-dir", str(tmp_path)], cwd=ROOT, text=True, capture_output=True, timeout=60
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert "--proxy-port needs --tls-port" in process.stderr


def test_an_occupied_proxy_port_stops_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"tls_port": str(free_port()), "proxy_port": str(taken.getsockname()[1])}
        with serving(tmp_path, TEST_MODELS, **ports) as server:
            assert server.process.wait(60) == 1
            server.wait_for("could not start")
    assert "Traceback" not in server.output


def test_the_proxy_listens_on_loopback_whatever_the_host_setting_is(tmp_path: Path) -> None:
    with serving_with_proxy(tmp_path, TEST_MODELS, host="0.0.0.0", keys="alice:secret") as server:
        port, proxy_port = int(server.url.rpartition(":")[2]), int(server.settings["PROXY_PORT"])
        socket.create_connection(("127.0.0.2", port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", proxy_port))
        hello: Any = client_output(server, VERSIONS[0], "hello", "test/null")
        assert hello["prompt"] == "hello"
        refused = client_output(server, VERSIONS[0], "hello", "test/null", FAL_KEY="mallory:secret")
        assert refused["status_code"] == 401
