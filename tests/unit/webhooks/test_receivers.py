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
from typing import Any

import pytest
from httpcore._backends.anyio import AnyIOStream

from server.net import tls
from server.webhooks.delivery import DELAYS
from tests.support.components import Parts, finished, opened
from tests.unit.webhooks.test_delivery import delivery, turn

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
def receiving(behave: Behaviour, context: ssl.SSLContext | None = None, times: int = 1) -> Iterator[str]:
    """The address of a receiver that takes so many connections, one after the other."""

    def serve() -> None:
        for _ in range(times):
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
        try:
            yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/hook"
        except BaseException:
            # Whoever was not called is not waited for.
            listener.shutdown(socket.SHUT_RDWR)
            raise
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
    monkeypatch.setattr("server.webhooks.delivery.TIMEOUT", PATIENCE)
    behave, is_success = BEHAVIOURS[name]
    with receiving(behave) as url:
        is_told(parts, url, is_success=is_success)


def test_there_are_as_many_as_were_asked_for() -> None:
    assert len(BEHAVIOURS) >= 32


@pytest.mark.soak
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_bad_receiver_again_and_again(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All eleven attempts, each exactly when it is due, or eleven requests that are told of once."""
    monkeypatch.setattr("server.webhooks.delivery.TIMEOUT", PATIENCE)
    behave, is_success = BEHAVIOURS[name]
    attempts = 1 + len(DELAYS)
    with receiving(behave, times=attempts) as url:
        if is_success:
            for number in range(attempts):
                with opened(tmp_path / str(number)) as parts:
                    is_told(parts, url, is_success=True)
            return
        with opened(tmp_path) as parts:
            finished(parts, webhook_url=url)
            for number, delay in enumerate((*DELAYS, None), 1):
                turn(parts)
                attempt, due_at, delivered_at, error = delivery(parts)
                assert (attempt, delivered_at) == (number, None)
                assert due_at == (delay and parts.clock.now + delay)
                assert error
                # It is not due before: nobody is called, and the receiver takes no more than it was told to.
                parts.clock.now += (delay or 3600) - 1
                assert turn(parts) == (1 if delay else 60)
                parts.clock.now += 1


#: Replies that never end, at each place where they could.
ENDLESS = [name for name in BEHAVIOURS if "endless" in name or name == "100 for ever"]
#: What the system and the loop take beside what is read: our buffer, the receiver's, and one chunk.
ON_THE_WAY = 2**16


@pytest.mark.parametrize("name", ENDLESS)
def test_little_of_an_endless_reply_is_read(parts: Parts, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 64 KiB. The receiver, whose own buffer is as small as can be, counts what it gets rid of."""
    behave, is_success = BEHAVIOURS[name]
    sent = 0

    class Counting:
        """A connection that counts."""

        def __init__(self, connection: socket.socket) -> None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            self._connection = connection
            self.recv = connection.recv

        def sendall(self, part: bytes) -> None:
            nonlocal sent
            while part:
                number = self._connection.send(part)
                sent, part = sent + number, part[number:]

    took, read = 0, AnyIOStream.read

    async def counting(stream: AnyIOStream, *limits: Any) -> bytes:
        nonlocal took
        found = await read(stream, *limits)
        took += len(found)
        return found

    monkeypatch.setattr(AnyIOStream, "read", counting)
    with receiving(lambda connection: behave(Counting(connection))) as url:  # type: ignore[arg-type]
        is_told(parts, url, is_success=is_success)
    assert 0 < took <= 65_536
    assert took <= sent <= took + ON_THE_WAY


def test_a_certificate_that_nobody_signed(parts: Parts, tmp_path: Path) -> None:
    files = tls.ensure_certificate(tmp_path / "stranger", "127.0.0.1", "")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    with receiving(says(OK + b"Content-Length: 0\r\n\r\n"), context) as url:
        is_told(parts, url, is_success=False)


def test_plain_words_where_tls_was_promised(parts: Parts) -> None:
    with receiving(says(OK + b"Content-Length: 0\r\n\r\n")) as url:
        is_told(parts, url.replace("http:", "https:"), is_success=False)
