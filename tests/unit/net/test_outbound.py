"""Tests of the guard: which addresses the server may connect to for a client."""

import asyncio
import socket
from pathlib import Path

import httpx
import pytest
from pytest_httpserver import HTTPServer

from server.errors import InvalidInputFile
from server.net.outbound import MAX_ETAG, ForbiddenURL, OutboundClient
from tests.unit.webhooks.test_receivers import endless, receiving

LOOPBACK = ("127.0.0.0/8", "::1/128")


def post(guard: OutboundClient, url: str, content: bytes = b"{}") -> int:
    """POST the content, and return the status of the response."""
    return asyncio.run(guard.post(url, content, {"content-type": "application/json"}, 30))


#: URLs that no setting can permit.
NONSENSE = [
    "",
    "nonsense",
    "//example.com/hook",
    "http://",
    "http://[::1",
    "http://a b/",
    "http://a..b/",
    "http://example.com:0/",
    "http://example.com:99999/",
    # Schemes other than HTTP and HTTPS.
    "file:///etc/passwd",
    "ftp://example.com/",
    "gopher://example.com/",
    "unix:///run/docker.sock",
    "javascript:alert(1)",
    "data:text/plain,x",
    # Credentials, and a misleading host.
    "http://user:password@example.com/",
    "http://example.com@127.0.0.1/",
    # Ports below 1024 of other services, such as SSH and mail.
    "http://example.com:22/",
    "http://example.com:25/",
    # This machine, in misleading spellings.
    "http://2130706433/",
    "http://0177.0.0.1/",
    "http://127.1/",
    "http://127.0.0.1./",
    "http://%31%32%37.0.0.1/",
]
#: URLs that an operator may have reasons to permit.
INNER = [
    # This machine and this network, in every other spelling.
    "http://127.0.0.1/",
    "http://127.0.0.1#@example.com/",
    "http://127.255.255.254/",
    "http://0.0.0.0/",
    "http://①②⑦.0.0.1/",
    "http://[::1]/",
    "http://[::]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/",
    # Teredo, by server and by client address; translated addresses; site-local, reserved and private networks.
    "http://[2001:0:7f00:1::]/",
    "http://[2001:0:808:808::80ff:fffe]/",
    "http://[::7f00:1]/",
    "http://[::ffff:0:127.0.0.1]/",
    "http://[::ffff:0:7f00:1]/",
    "http://[0:0:0:0:ffff:0:a9fe:a9fe]/",
    "http://[::ffff:0:8.8.8.8]/",
    "http://[64:ff9b:1::7f00:1]/",
    "http://[64:ff9b:0:1::7f00:1]/",
    "http://[feff::1]/",
    "http://[200::1]/",
    "http://[4000::1]/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.0.1/",
    "http://100.64.0.1/",
    "http://[fd00::1]/",
    "http://[fe80::1]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    # The metadata services of clouds, which hold secrets.
    "http://169.254.169.254/latest/meta-data/",
    "http://[fd00:ec2::254]/",
    "http://[::ffff:169.254.169.254]/",
    "http://192.0.0.192/",
]
FORBIDDEN = [*NONSENSE, *INNER]


@pytest.mark.parametrize("url", INNER)
def test_an_internal_address_is_rejected_at_once_and_the_error_names_the_setting(url: str) -> None:
    with pytest.raises(ForbiddenURL, match=r"; the setting --outbound-allow can permit it$"):
        OutboundClient().check(url)


@pytest.mark.parametrize("url", NONSENSE)
def test_a_url_that_no_setting_permits_is_rejected_without_naming_the_setting(url: str) -> None:
    for allow in ((), ("0.0.0.0/0", "::/0", "example.com", "a..b", "127.1", "2130706433")):
        with pytest.raises(ForbiddenURL) as error:
            OutboundClient(allow).check(url)
        assert "--outbound-allow" not in str(error.value)


@pytest.mark.parametrize("url", FORBIDDEN)
def test_a_rejected_url_is_not_posted_to_either(url: str) -> None:
    with pytest.raises(ForbiddenURL):
        post(OutboundClient(), url)


@pytest.mark.parametrize("url", FORBIDDEN)
def test_the_error_is_short(url: str) -> None:
    with pytest.raises(ForbiddenURL) as error:
        OutboundClient().check(url)
    assert len(str(error.value)) < 500


ALLOWED = [
    "https://example.com/hook",
    "http://example.com:8080/hook?token=1#part",
    "https://93.184.216.34/",
    "https://[2606:2800:220:1:248:1893:25c8:1946]/",
    # Public IPv4 addresses within IPv6 addresses.
    "https://[::ffff:93.184.216.34]/",
    "https://[64:ff9b::5db8:d822]/",
    "HTTPS://EXAMPLE.COM/",
    "https://bücher.example/",
]


@pytest.mark.parametrize("url", ALLOWED)
def test_the_public_web_is_allowed(url: str) -> None:
    OutboundClient().check(url)
    OutboundClient(("10.0.0.0/8", "hooks.lan")).check(url)


def names_of_loopback(port: int) -> list[str]:
    """Return URLs with names and odd spellings that the resolver turns into 127.0.0.1."""
    return [f"http://{name}:{port}/" for name in ("localhost", "0x7f.1", "0x7f000001", "0x7f.0x0.0x0.0x1")]


def test_a_name_of_this_machine_is_rejected_on_connecting(httpserver: HTTPServer, tmp_path: Path) -> None:
    httpserver.expect_request("/").respond_with_data("in")
    for url in names_of_loopback(httpserver.port):
        with pytest.raises(ForbiddenURL, match=r"; the setting --outbound-allow can permit it$"):
            post(OutboundClient(), url)
        with pytest.raises(ForbiddenURL, match=r"; the setting --outbound-allow can permit it$"):
            asyncio.run(OutboundClient().download(url, tmp_path / "file", 1000, 30))
    assert httpserver.log == []


def test_an_allowed_network_is_reached_by_address_and_by_name(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/", method="POST", data=b"{}").respond_with_data("in", status=201)
    guard = OutboundClient(LOOPBACK)
    for url in (f"http://127.0.0.1:{httpserver.port}/", f"http://localhost:{httpserver.port}/"):
        guard.check(url)
        assert post(guard, url) == 201


def test_an_allowed_host_is_reached_only_by_its_name(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/").respond_with_data("in")
    guard = OutboundClient(("LOCALHOST",))
    assert post(guard, f"http://localhost:{httpserver.port}/") == 200
    assert post(guard, f"http://LocalHost:{httpserver.port}/") == 200
    with pytest.raises(ForbiddenURL):
        guard.check(f"http://127.0.0.1:{httpserver.port}/")


@pytest.mark.parametrize(
    ("allow", "url", "is_allowed"),
    [
        ("10.0.0.0/8", "http://10.255.0.1/", True),
        ("10.0.0.0/8", "http://11.0.0.1/", True),
        ("10.0.0.0/8", "http://192.168.0.1/", False),
        ("10.1.2.3", "http://10.1.2.3/", True),
        ("10.1.2.3", "http://10.1.2.4/", False),
        ("10.1.2.3/8", "http://10.9.9.9/", True),
        ("fd00::/8", "http://[fd12::1]/", True),
        ("hooks.lan", "http://hooks.lan:8080/", True),
        ("hooks.lan", "http://10.0.0.1/", False),
        ("10.0.0.0/8", "file:///etc/passwd", False),
        ("10.0.0.0/8", "http://user:password@10.0.0.1/", False),
        ("hooks.lan", "ftp://hooks.lan/", False),
    ],
)
def test_the_setting_permits_only_what_it_names(allow: str, url: str, is_allowed: bool) -> None:
    guard = OutboundClient((allow,))
    if is_allowed:
        return guard.check(url)
    with pytest.raises(ForbiddenURL):
        guard.check(url)
    return None


@pytest.mark.parametrize(("length", "is_kept"), [(MAX_ETAG, True), (MAX_ETAG + 1, False)])
def test_a_long_etag_is_dropped(httpserver: HTTPServer, tmp_path: Path, length: int, is_kept: bool) -> None:
    """The server remembers the ETags of thousands of URLs, so each must be short."""
    etag = f'"{"x" * (length - 2)}"'
    httpserver.expect_request("/").respond_with_data("in", headers={"etag": etag})
    etag_kept = asyncio.run(OutboundClient(LOOPBACK).download(httpserver.url_for("/"), tmp_path / "file", 1000, 30))
    assert etag_kept == (etag if is_kept else "")
    assert (tmp_path / "file").read_text() == "in"


def test_a_redirect_is_not_followed(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/").respond_with_data(status=307, headers={"location": "/elsewhere"})
    httpserver.expect_request("/elsewhere").respond_with_data("in")
    assert post(OutboundClient(LOOPBACK), httpserver.url_for("/")) == 307
    assert [request.path for request, _ in httpserver.log] == ["/"]


def test_a_proxy_of_the_environment_is_not_used(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9999")
    httpserver.expect_request("/").respond_with_data("in")
    assert post(OutboundClient(LOOPBACK), httpserver.url_for("/")) == 200


def test_the_public_authorities_are_loaded_only_once(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the authorities takes 15 ms, during which the server does nothing else."""
    httpserver.expect_request("/").respond_with_data("in")
    guard = OutboundClient(LOOPBACK)
    monkeypatch.setattr("ssl.create_default_context", None)
    assert [post(guard, httpserver.url_for("/")) for _ in range(2)] == [200, 200]


def test_endless_interim_responses_stop_a_download(tmp_path: Path) -> None:
    """The download stops at twice the file's size limit plus 64 KiB, before the time limit."""
    too_long = pytest.raises(InvalidInputFile, match="the response is longer than 67536 bytes")
    with receiving(endless(b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 1000)) as url, too_long:
        asyncio.run(OutboundClient(LOOPBACK).download(url, tmp_path / "file", 1000, 30))


def test_no_response_is_an_http_error_not_a_forbidden_url() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(httpx.HTTPError):
            post(OutboundClient(LOOPBACK), f"http://127.0.0.1:{unused.getsockname()[1]}/")
