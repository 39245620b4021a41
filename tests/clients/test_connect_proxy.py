"""The CONNECT door: fal-client of every age whole, with environment variables alone, and no way out of it."""

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
from tests.clients.test_python_client import exports, picture
from tests.support.connect_clients import VERSIONS, finished, folder_of, reached, said, watched
from tests.support.server_process import ROOT, TEST_MODELS, Server, free_port, serving, with_door

PART = 10 * 2**20
#: What fal-client sends in parts: over 100 MiB.
LARGE = 101 * 2**20
ENDS = b"\r\n\r\n"

of_every_age = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, and a large file that is almost all holes, with another byte at the head of each part."""
    folder = tmp_path_factory.mktemp("uploads")
    Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / "small.png")
    with (folder / "large.bin").open("wb") as file:
        file.truncate(LARGE)
        for number in range(LARGE // PART + 1):
            file.seek(number * PART)
            file.write(bytes([number + 1]))
    return folder


def test_the_variables_printed(door: Server) -> None:
    printed = exports(door)
    proxy = f"http://127.0.0.1:{door.settings['PROXY_PORT']}"
    shared = {"FAL_KEY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"}
    names = [f"{scheme}_PROXY" for scheme in ("HTTPS", "HTTP", "WSS", "WS")]
    proxies = {*names, *(name.lower() for name in names)}
    assert set(printed) == {*shared, *proxies, "NO_PROXY", "no_proxy"}
    assert {printed[name] for name in proxies} == {proxy}
    assert {"127.0.0.1", "localhost"} == set(printed["NO_PROXY"].split(","))


@of_every_age
def test_it_is_that_version(door: Server, version: str) -> None:
    found, place = said(door, version, "version")
    assert found == version
    assert folder_of(version) in (None, Path(place).parent)


@of_every_age
def test_every_way_gives_the_same_picture(door: Server, version: str) -> None:
    got = said(door, version, "everyday")
    answers = [got["run"], got["submit"], got["subscribe"], got["stream"][-1], got["result"]]
    assert len({picture(answer) for answer in answers}) == 1
    assert {answer["seed"] for answer in answers} == {7}
    assert got["events"][-1]["type"] == got["status"]["type"] == "Completed"
    assert [line["message"] for line in got["events"][-1]["logs"]] == [f"step {step}/4" for step in (1, 2, 3, 4)]


def test_every_way_without_blocking(door: Server) -> None:
    got = said(door, VERSIONS[0], "everyday_async")
    assert len({picture(got[way]) for way in ("run", "submit", "subscribe", "result")}) == 1


@of_every_age
def test_uploads(door: Server, version: str, folder: Path) -> None:
    done = finished(door, version, "uploads", str(folder))
    # The newest client would go on by another way than the one that is meant here.
    assert "falling back" not in done.stderr
    found = json.loads(done.stdout)
    with httpx.Client(trust_env=False) as client:
        assert client.get(found["text"]).content == b"hello"
        assert client.get(found["small"]).content == (folder / "small.png").read_bytes()
        with Image.open(io.BytesIO(client.get(found["picture"]).content)) as sent:
            assert (sent.format, sent.getpixel((0, 0))) == ("PNG", (200, 30, 30))
    assert digest_at(found["large"]) == hashlib.sha256((folder / "large.bin").read_bytes()).hexdigest()


def digest_at(url: str) -> str:
    """SHA-256 of what is found there, taken piece by piece."""
    digest = hashlib.sha256()
    with httpx.stream("GET", url, trust_env=False) as answer:
        for piece in answer.iter_bytes(2**20):
            digest.update(piece)
    return digest.hexdigest()


@of_every_age
def test_uploads_without_blocking(door: Server, version: str, folder: Path) -> None:
    done = finished(door, version, "uploads_async", str(folder))
    assert "falling back" not in done.stderr
    found = json.loads(done.stdout)
    assert httpx.get(found["text"], trust_env=False).content == b"hello"
    assert httpx.get(found["small"], trust_env=False).content == (folder / "small.png").read_bytes()


@pytest.mark.parametrize("kind", ["realtime", "realtime_async"])
def test_realtime(door: Server, kind: str) -> None:
    first, refused, *others = said(door, VERSIONS[0], kind)
    assert len({picture(answer) for answer in (first, *others)}) == 1
    assert (first["seed"], first["prompt"], first["has_nsfw_concepts"]) == (7, "a red apple", [False])
    assert (refused["type"], refused["error"]) == ("x-fal-error", "INVALID_INPUT")
    assert "prompt" in refused["reason"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server that was there, had its door open, and is there no more."""
    with with_door(tmp_path_factory.mktemp("stopped"), TEST_MODELS) as server:
        exports(server)
        assert server.stop() == 0
    return server


@of_every_age
def test_nothing_goes_elsewhere_when_the_server_is_stopped(
    stopped: Server, version: str, folder: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    failures = said(stopped, version, "hopeless", str(folder), **watched(notes))
    assert None not in failures.values()
    assert reached(notes) == {"127.0.0.1"}


def test_the_canary_sees_what_goes_elsewhere(stopped: Server, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    elsewhere = {**watched(notes), "HTTPS_PROXY": "http://127.0.0.2:9", "https_proxy": "http://127.0.0.2:9"}
    assert said(stopped, "0.7.0", "hopeless", str(tmp_path), **elsewhere)["run"]
    assert "127.0.0.2" in reached(notes)


@contextmanager
def entered(server: Server, name: str, port: int = 443) -> Iterator[tuple[socket.socket, bytes]]:
    """A connection through the door of a server, and the first line that it answered with."""
    with socket.create_connection(("127.0.0.1", int(server.settings["PROXY_PORT"])), 30) as plain:
        plain.sendall(f"CONNECT {name}:{port} HTTP/1.1\r\nhost: {name}:{port}".encode() + ENDS)
        yield plain, head(plain)


def head(plain: socket.socket) -> bytes:
    """What is said up to the empty line, or up to the end."""
    found = b""
    while not found.endswith(ENDS) and (byte := plain.recv(1)):
        found += byte
    return found


def everything(port: int, sent: bytes) -> bytes:
    """What the door at this port says to this before it closes; nothing when it closes without a word."""
    found = b""
    # Closed with something unread: that is how refusing a flood looks from outside.
    with suppress(ConnectionResetError, BrokenPipeError), socket.create_connection(("127.0.0.1", port), 30) as plain:
        plain.sendall(sent)
        while piece := plain.recv(65_536):
            found += piece
    return found


#: With something in the place of the star.
NAMES = [name.replace("*", "anything") for name in CERTIFICATE_NAMES]


@pytest.mark.parametrize("name", [*NAMES, "FAL.RUN", "fal.run.", "Queue.Fal.Run."])
def test_every_name_of_fal_leads_here(door: Server, name: str) -> None:
    trusted = ssl.create_default_context(cafile=str(door.data_dir / "tls" / "ca.pem"))
    proper = name.lower().rstrip(".")
    with entered(door, name) as (plain, answer), trusted.wrap_socket(plain, server_hostname=proper) as secure:
        assert answer.startswith(b"HTTP/1.1 200 ")
        secure.sendall(f"GET /health HTTP/1.1\r\nhost: {proper}\r\nconnection: close".encode() + ENDS)
        is_offered = role_of(proper) in (Role.RUN, Role.QUEUE, Role.REST)
        assert head(secure).startswith(b"HTTP/1.1 200 " if is_offered else b"HTTP/1.1 404 ")


OTHERS = [
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


@pytest.mark.parametrize("name", OTHERS)
def test_other_hosts_are_refused(door: Server, name: str) -> None:
    port = int(door.settings["PROXY_PORT"])
    answer = everything(port, f"CONNECT {name}:443 HTTP/1.1".encode() + ENDS)
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
def test_nothing_else_is_understood(door: Server, line: bytes, status: int) -> None:
    assert everything(int(door.settings["PROXY_PORT"]), line + ENDS).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize(
    "target", ["https://fal.run", "http://fal.run", "HTTP://Fal.Run:80", "http://fal.run.", "http://fal.run:8000"]
)
def test_a_whole_request_for_a_name_of_fal_is_answered_here(door: Server, target: str) -> None:
    sent = f"GET {target}/health HTTP/1.1\r\nhost: fal.run\r\nproxy-connection: keep-alive".encode() + ENDS
    answer = everything(int(door.settings["PROXY_PORT"]), sent)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"alive"' in answer


def test_a_whole_request_has_its_body(door: Server) -> None:
    body = b'{"prompt": "plain"}'
    line = "POST http://fal.run/test/null HTTP/1.1\r\nhost: fal.run\r\ncontent-type: application/json"
    sent = f"{line}\r\ncontent-length: {len(body)}".encode() + ENDS + body
    assert b'"prompt":"plain"' in everything(int(door.settings["PROXY_PORT"]), sent)


def test_a_tunnel_to_the_plain_port_is_plain(door: Server) -> None:
    with entered(door, "queue.fal.run", 80) as (plain, answer):
        assert answer.startswith(b"HTTP/1.1 200 ")
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: queue.fal.run\r\nconnection: close" + ENDS)
        assert head(plain).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("name", ["a.b.c.fal.ai", "a.b.fal.run"])
def test_a_name_that_no_certificate_bears_is_refused_truly(door: Server, name: str) -> None:
    answer = everything(int(door.settings["PROXY_PORT"]), f"CONNECT {name}:443 HTTP/1.1".encode() + ENDS)
    assert answer.startswith(b"HTTP/1.1 403 Not offered by this server")


@pytest.mark.parametrize("sent", [b"x" * 100_000, b"CONNECT fal.run:443 HTTP/1.1\r\n" + b"x: y\r\n" * 20_000])
def test_a_head_that_is_too_long_gets_nowhere(door: Server, sent: bytes) -> None:
    assert b" 200 " not in everything(int(door.settings["PROXY_PORT"]), sent)
    assert_still_open(door)


@pytest.mark.parametrize("target", ["fal.run:" + "1" * 5000, "fal.run:443:443", ":443", "a..b:443", "\udcff:443"])
def test_targets_that_make_no_sense_are_refused(door: Server, target: str) -> None:
    sent, before = b"CONNECT " + target.encode("utf-8", "surrogateescape") + b" HTTP/1.1" + ENDS, len(door.output)
    assert everything(int(door.settings["PROXY_PORT"]), sent).startswith(b"HTTP/1.1 4")
    assert "Traceback" not in door.output[before:]


def assert_still_open(door: Server) -> None:
    """Others get in as before."""
    with entered(door, "fal.run") as (_, answer):
        assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_head_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect_proxy, "_HEAD_TIMEOUT", 0.05)

    async def knock() -> bytes:
        port = free_port()
        door = ConnectProxy("127.0.0.1", 1, 2, allow_any_host=False)
        await door.open("127.0.0.1", port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"CONNECT fal.run:443 HTTP/1.1\r\n")
        answer = await reader.read()
        writer.close()
        await door.close()
        return answer

    assert asyncio.run(knock()).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_leaves_in_the_middle_harms_nobody(door: Server) -> None:
    with socket.create_connection(("127.0.0.1", int(door.settings["PROXY_PORT"]))) as plain:
        plain.sendall(b"CONNECT fal.run:443 HT")
    with entered(door, "fal.run") as (plain, _):
        plain.sendall(b"\x16\x03\x01")
    assert_still_open(door)


def test_a_stop_ends_open_tunnels(tmp_path: Path) -> None:
    with with_door(tmp_path, TEST_MODELS) as server, entered(server, "fal.run") as (plain, _):
        assert server.stop() == 0
        assert "Traceback" not in server.output
        with suppress(ConnectionError):
            assert plain.recv(1) == b""


@contextmanager
def other_host(folder: Path) -> Iterator[tuple[int, ssl.SSLContext]]:
    """A TLS server that is not fal's: says hello to one client; its port, and what trusts it."""
    files = tls.ensure_certificate(folder, "127.0.0.1")
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(files.certificate, files.key)

    def serve() -> None:
        accepted, _ = listener.accept()
        with accepted, ours.wrap_socket(accepted, server_side=True) as secure:
            secure.recv(65_536)
            secure.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], ssl.create_default_context(cafile=str(files.authority))
        thread.join()


@pytest.fixture(scope="module")
def generous(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose door lets others through."""
    with with_door(tmp_path_factory.mktemp("generous"), TEST_MODELS, proxy_others="true") as server:
        yield server


def test_others_are_let_through_when_that_is_asked_for(generous: Server, tmp_path: Path) -> None:
    proxy = f"http://127.0.0.1:{generous.settings['PROXY_PORT']}"
    with other_host(tmp_path) as (port, trusted), httpx.Client(proxy=proxy, verify=trusted) as client:
        assert client.get(f"https://localhost:{port}/").text == "hello"
    with entered(generous, "fal.run") as (_, answer):
        assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("target", ["localhost:{}", "localhost:99999999", "no.such.host.invalid:443", "a..b:443", ":1"])
def test_others_that_cannot_be_reached(generous: Server, target: str) -> None:
    sent, before = f"CONNECT {target.format(free_port())} HTTP/1.1".encode() + ENDS, len(generous.output)
    assert everything(int(generous.settings["PROXY_PORT"]), sent).startswith((b"HTTP/1.1 502 ", b"HTTP/1.1 4"))
    assert "Traceback" not in generous.output[before:]


def test_a_door_without_tls_is_a_bad_setting(tmp_path: Path) -> None:
    given = {"FLUX_SERVER_PROXY_PORT": "8888", "FLUX_SERVER_TLS_PORT": "0"}
    with pytest.raises(SettingsError, match="--proxy-port needs --tls-port"):
        Settings.load(given)
    command = [sys.executable, "-m", "server", "serve", "--proxy-port", "8888", "--tls-port", "0"]
    done = subprocess.run([*command, "--data-dir", str(tmp_path)], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--proxy-port needs --tls-port" in done.stderr


def test_a_door_whose_port_is_taken_stops_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"tls_port": str(free_port()), "proxy_port": str(taken.getsockname()[1])}
        with serving(tmp_path, TEST_MODELS, **ports) as server:
            assert server.process.wait(60) == 1
            server.wait_for("could not start")
    assert "Traceback" not in server.output


def test_the_door_is_on_loopback_whatever_the_host_is(tmp_path: Path) -> None:
    with with_door(tmp_path, TEST_MODELS, host="0.0.0.0", keys="alice:secret") as server:
        port, proxy_port = int(server.url.rpartition(":")[2]), int(server.settings["PROXY_PORT"])
        socket.create_connection(("127.0.0.2", port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", proxy_port))
        hello: Any = said(server, VERSIONS[0], "hello", "test/null")
        assert hello["prompt"] == "hello"
        refused = said(server, VERSIONS[0], "hello", "test/null", FAL_KEY="mallory:secret")
        assert refused["status_code"] == 401
