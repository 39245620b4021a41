"""Receivers of webhooks that behave badly, each on a real socket: the schedule is kept, and nothing else suffers."""

import contextlib
import gzip
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server import tls
from server.webhooks import DELAYS
from tests.parts import Parts, finished
from tests.test_webhooks import delivery, turn

#: Seconds that a receiver has in these tests, of which one that hangs takes all.
PATIENCE = 0.3
OK = b"HTTP/1.1 200 OK\r\n"
Behaviour = Callable[[socket.socket], None]


def says(*parts: bytes) -> Behaviour:
    """Reads the request, and answers so."""

    def behave(connection: socket.socket) -> None:
        connection.recv(65_536)
        for part in parts:
            connection.sendall(part)

    return behave


def hangs_after(*parts: bytes) -> Behaviour:
    """Answers so, and then holds the line until the other side gives up."""

    def behave(connection: socket.socket) -> None:
        says(*parts)(connection)
        while connection.recv(65_536):
            continue

    return behave


def endless(head: bytes, part: bytes) -> Behaviour:
    """Never stops talking."""

    def behave(connection: socket.socket) -> None:
        says(head)(connection)
        while True:
            connection.sendall(part)

    return behave


def dripping(head: bytes) -> Behaviour:
    """A byte of a header now and then."""

    def behave(connection: socket.socket) -> None:
        says(head)(connection)
        wait = threading.Event()
        while True:
            connection.sendall(b"x")
            wait.wait(0.02)

    return behave


def resets(*parts: bytes) -> Behaviour:
    """Answers so, then cuts the line."""

    def behave(connection: socket.socket) -> None:
        says(*parts)(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return behave


def unread(connection: socket.socket) -> None:
    """Does not even read the request."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


BOMB = gzip.compress(b"\0" * 20_000_000)
#: What a receiver does, and whether that is success.
BEHAVIOURS: dict[str, tuple[Behaviour, bool]] = {
    "says nothing and closes": (says(), False),
    "closes without reading": (unread, False),
    "hangs": (hangs_after(), False),
    "hangs after half a status line": (hangs_after(b"HTTP/1.1 2"), False),
    "hangs in its headers": (hangs_after(OK, b"X-A: b\r\n"), False),
    "hangs in its body": (hangs_after(OK, b"Content-Length: 5\r\n\r\nab"), True),
    "resets at once": (resets(), False),
    "resets in its headers": (resets(OK), False),
    "drips a status line": (dripping(b"HTTP/1.1 200 "), False),
    "drips a header": (dripping(OK + b"X-A: "), False),
    "endless status line": (endless(b"HTTP/1.1 200 ", b"O" * 65_536), False),
    "endless header": (endless(OK + b"X-A: ", b"a" * 65_536), False),
    "endless headers": (endless(OK, b"X-A: b\r\n" * 8_192), False),
    "endless body": (endless(OK + b"\r\n", b"a" * 65_536), True),
    "endless chunks": (endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"4\r\naaaa\r\n" * 4_096), True),
    "compressed bomb": (
        says(OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB), BOMB),
        True,
    ),
    "a gigabyte announced": (says(OK + b"Content-Length: 1073741824\r\n\r\nab"), True),
    "two lengths": (says(OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\na"), False),
    "a length that is none": (says(OK + b"Content-Length: many\r\n\r\n"), False),
    "not HTTP": (says(b"220 mail.example.com ESMTP\r\n"), False),
    "HTTP/0.9": (says(b"<html>hello</html>"), False),
    "HTTP/2 only": (says(b"\0\0\x12\x04\0\0\0\0\0"), False),
    "a status that is none": (says(b"HTTP/1.1 abc OK\r\n\r\n"), False),
    "status 99": (says(b"HTTP/1.1 99 Low\r\nContent-Length: 0\r\n\r\n"), False),
    "status 1000": (says(b"HTTP/1.1 1000 High\r\nContent-Length: 0\r\n\r\n"), False),
    "100 for ever": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), False),
    "101": (hangs_after(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), False),
    "sent elsewhere": (
        says(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n"),
        False,
    ),
    "sent to itself": (says(b"HTTP/1.1 307 Temporary\r\nLocation: /hook\r\nContent-Length: 0\r\n\r\n"), False),
    "not modified": (says(b"HTTP/1.1 304 Not Modified\r\n\r\n"), False),
    "a null in a header": (says(OK + b"X-A: \0\r\nContent-Length: 0\r\n\r\n"), False),
    "204 with a body": (says(b"HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\nabc"), True),
    "an interim answer first": (says(b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK + b"Content-Length: 0\r\n\r\n"), True),
}


@contextmanager
def receiving(behave: Behaviour, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a receiver that takes one connection."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            accepted, _ = listener.accept()
            with accepted if context is None else context.wrap_socket(accepted, server_side=True) as connection:
                # Longer than anybody here waits; a receiver that nobody leaves fails its test.
                connection.settimeout(30)
                behave(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        scheme = "http" if context is None else "https"
        yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/hook"
        thread.join(40)
        assert not thread.is_alive()


def is_told(parts: Parts, url: str, *, is_success: bool) -> None:
    """One attempt; then it is over, or due again exactly when the schedule says."""
    finished(parts, webhook_url=url)
    turn(parts)
    attempt, due_at, delivered_at, error = delivery(parts)
    assert attempt == 1
    if is_success:
        assert (due_at, delivered_at, error) == (None, parts.clock.now, None)
    else:
        assert (due_at, delivered_at) == (parts.clock.now + DELAYS[0], None)
        assert error


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_bad_receiver(parts: Parts, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.webhooks.TIMEOUT", PATIENCE)
    behave, is_success = BEHAVIOURS[name]
    with receiving(behave) as url:
        is_told(parts, url, is_success=is_success)


def test_there_are_as_many_as_were_asked_for() -> None:
    assert len(BEHAVIOURS) >= 32


def test_a_certificate_that_nobody_signed(parts: Parts, tmp_path: Path) -> None:
    files = tls.ensure(tmp_path / "stranger", "127.0.0.1", "")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    with receiving(says(OK + b"Content-Length: 0\r\n\r\n"), context) as url:
        is_told(parts, url, is_success=False)


def test_plain_words_where_tls_was_promised(parts: Parts) -> None:
    with receiving(says(OK + b"Content-Length: 0\r\n\r\n")) as url:
        is_told(parts, url.replace("http:", "https:"), is_success=False)
