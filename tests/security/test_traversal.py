"""Path traversal on /files and /static, sent without normalization: no file outside is ever read."""

import itertools
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.server_process import TEST_MODELS, Server, serving

SECRET = b"SQLite format 3"
#: Spellings of the parent directory.
UPS = (
    *(
        "..",
        "%2e%2e",
        "%2E%2E",
        ".%2e",
        "%2e.",
        "..%00",
        "..%20",
        "..;",
        "%c0%ae%c0%ae",
        "%252e%252e",
        "..%09",
        "....//..",
    ),
)
SLASHES = ("/", "%2f", "%2F", "\\", "%5c", "//", "%c0%af", "%252f")
#: Files in the parent directory of /files.
TARGETS = ("queue.sqlite3", "lock", "tls/ca.key")
TRICKS = [f"{up}{slash}{TARGETS[0]}" for up, slash in itertools.product(UPS, SLASHES)]
MORE = [
    *(f"/etc/passwd{end}" for end in ("", "%00.png", "?.png", "#.png", ".png")),
    *(f"../{target}" for target in TARGETS),
    *(f"x/../../{target}" for target in TARGETS),
    *(f"{'../' * 12}etc/passwd{end}" for end in ("", "%00.jpg")),
    *(f"file:///etc/passwd{end}" for end in ("", "%00")),
    "http://127.0.0.1/queue.sqlite3",
    "C:\\boot.ini",
    "~root/.bashrc",
    "~/.bashrc",
    "$HOME/.bashrc",
    "proc/self/environ",
    ".",
    "./",
    "%00",
    "%",
    "%zz",
    "%u002e%u002e/queue.sqlite3",
    "\xff\xfe",
    "a" * 5_000,
    "con",
    "queue.sqlite3-wal",
    "*",
    "?name=../queue.sqlite3",
]


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("private"), TEST_MODELS) as server:
        httpx.post(f"{server.ready().url}/test/null", json={"prompt": "x"}, trust_env=False).raise_for_status()
        yield server


def answer_to(server: Server, target: bytes) -> bytes:
    """Request exactly this target, without a client library; return the whole answer."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    return answer


@pytest.mark.parametrize("prefix", ["/files/", "/static/", "/queue/../files/", "/api/fal/proxy/../../files/"])
def test_nothing_outside_is_read(private: Server, prefix: str) -> None:
    assert len(TRICKS) + len(MORE) >= 60
    for trick in (*TRICKS, *MORE):
        answer = answer_to(private, (prefix + trick).encode("latin-1"))
        status = int(answer.split(b" ", 2)[1])
        assert status in (400, 404, 405), (trick, answer[:200])
        assert SECRET not in answer and b"root:" not in answer and b"PRIVATE KEY" not in answer, trick


def test_the_secret_can_be_found(private: Server) -> None:
    """Check that the secret exists; otherwise the test above could not fail."""
    content = (Path(private.data_dir) / "queue.sqlite3").read_bytes()
    assert content.startswith(SECRET)
