"""Headers that are sent twice, and headers, parameters and fields that are too long."""

import socket
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic_core import from_json

from tests.support.error_bodies import error_message, first_field_error
from tests.support.server_process import Server

HERE = b"Host: localhost"


def answer_to(server: Server, *headers: bytes) -> bytes:
    """Send a request with exactly these headers, without a client library; return the whole answer."""
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0), timeout=30) as connection:
        lines = b"\r\n".join((b"GET /health HTTP/1.1", *headers, b"Connection: close"))
        connection.sendall(lines + b"\r\n\r\n")
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    return answer


@pytest.mark.parametrize(
    ("name", "headers"),
    [
        ("Host", [HERE, b"Host: evil.example"]),
        ("Host", [b"Host: evil.example", HERE]),
        ("Host", [HERE, HERE]),
        ("Origin", [HERE, b"Origin: http://localhost:3000", b"Origin: https://evil.example"]),
        ("Origin", [HERE, b"Origin: https://evil.example", b"ORIGIN: http://localhost:3000"]),
        ("Authorization", [HERE, b"Authorization: Key a", b"authorization: Key b"]),
    ],
)
def test_headers_that_decide_about_access_are_sent_once(
    constrained_server: Server, name: str, headers: list[bytes]
) -> None:
    head, _, body = answer_to(constrained_server, *headers).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert from_json(body)["detail"] == f"The {name} header was sent 2 times; send it once"


@pytest.mark.parametrize(
    "headers",
    [
        [b"Content-Length: 1", b"Content-Length: 2"],
        [b"Content-Length: 0", b"Content-Length: 0"],
        [b"Content-Length: 0, 0"],
        [b"Content-Length: 0", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
    ],
)
def test_a_body_has_one_length(constrained_server: Server, headers: list[bytes]) -> None:
    """Check the status only: the HTTP parser refuses these requests with its own message."""
    assert answer_to(constrained_server, HERE, *headers).startswith(b"HTTP/1.1 400 ")


def test_headers_sent_once_are_accepted(constrained_server: Server) -> None:
    headers = (HERE, b"Origin: http://localhost:3000", b"Authorization: Key a", b"Content-Length: 0")
    assert answer_to(constrained_server, *headers).startswith(b"HTTP/1.1 200 ")


def test_the_host_has_a_limit(keyless_client: httpx.Client) -> None:
    assert keyless_client.get("/health", headers={"host": "a" * 250 + ":8000"}).status_code == 200
    answer = keyless_client.get("/health", headers={"host": "a" * 256})
    assert error_message(answer, 400) == "The Host header has 256 characters; it should have at most 255"


def test_the_runner_hint_has_a_limit(client: httpx.Client) -> None:
    def submit(length: int) -> httpx.Response:
        headers = {"x-fal-runner-hint": "x" * length}
        return client.post("/queue/test/null", json={"prompt": "x"}, headers=headers)

    assert submit(255).status_code == 200
    assert error_message(submit(256), 400) == "X-Fal-Runner-Hint should have at most 255 characters, not 256"


def test_the_url_of_a_webhook_has_a_limit(client: httpx.Client) -> None:
    def refused(length: int) -> str:
        parameters = {"fal_webhook": "http://10.0.0.1/".ljust(length, "x")}
        entry = first_field_error(client.post("/queue/test/null", params=parameters, json={"prompt": "x"}))
        assert entry["loc"] == ["query", "fal_webhook"]
        assert len(entry["input"]) <= 1000
        return str(entry["msg"])

    assert refused(2049) == "URL should have at most 2048 characters"
    # A URL within the limit is refused because of its private address.
    assert "10.0.0.0/8" in refused(2048)


def test_the_name_of_a_model_has_a_limit(client: httpx.Client) -> None:
    """Limit the name, because the answer about an unknown model repeats it."""

    def refused(length: int) -> tuple[int, str]:
        answer = client.post("/v1/images/generations", json={"prompt": "x", "model": "x" * length})
        return answer.status_code, answer.json()["error"]["code"]

    assert refused(255) == (404, "model_not_found")
    assert refused(256) == (400, "string_too_long")


def test_the_names_in_a_token_have_a_limit(keyless_client: httpx.Client) -> None:
    def submit(length: int) -> httpx.Response:
        body = {"allowed_apps": ["x" * length]}
        return keyless_client.post("/tokens", json=body, headers={"authorization": "Key alice:secret"})

    assert submit(255).status_code == 200
    assert first_field_error(submit(256))["loc"] == ["body", "allowed_apps", 0]
