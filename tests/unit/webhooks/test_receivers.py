"""Tests of webhook receivers that behave badly, each on a real socket: the server keeps the schedule of retries."""

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
from tests.support.components import Components, finish_job, open_components
from tests.unit.webhooks.test_delivery import delivery, send_after_restart

#: How long the server waits for a response in these tests, in seconds. A receiver that hangs uses all of this time.
TIMEOUT = 0.3
OK = b"HTTP/1.1 200 OK\r\n"
Behaviour = Callable[[socket.socket], None]


def sends(*parts: bytes) -> Behaviour:
    """Return a behaviour that reads the request and sends these parts."""

    def behave(connection: socket.socket) -> None:
        connection.recv(65_536)
        for part in parts:
            connection.sendall(part)

    return behave


def hangs_after(*parts: bytes) -> Behaviour:
    """Return a behaviour that sends these parts, then keeps the connection open until the server closes it."""

    def behave(connection: socket.socket) -> None:
        sends(*parts)(connection)
        while connection.recv(65_536):
            continue

    return behave


def endless(head: bytes, part: bytes) -> Behaviour:
    """Return a behaviour that sends `head`, then `part` without end."""

    def behave(connection: socket.socket) -> None:
        sends(head)(connection)
        while True:
            connection.sendall(part)

    return behave


def dripping(head: bytes) -> Behaviour:
    """Return a behaviour that sends `head`, then one byte every 20 ms."""

    def behave(connection: socket.socket) -> None:
        sends(head)(connection)
        wait = threading.Event()
        while True:
            connection.sendall(b"x")
            wait.wait(0.02)

    return behave


def resets(*parts: bytes) -> Behaviour:
    """Return a behaviour that sends these parts, then resets the connection."""

    def behave(connection: socket.socket) -> None:
        sends(*parts)(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return behave


def reset_unread(connection: socket.socket) -> None:
    """Reset the connection without reading the request."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


BOMB = gzip.compress(b"\0" * 20_000_000)
#: Each behaviour, and whether the server counts the delivery as a success.
BEHAVIOURS: dict[str, tuple[Behaviour, bool]] = {
    "closes without an answer": (sends(), False),
    "closes without reading": (reset_unread, False),
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
        sends(OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB), BOMB),
        True,
    ),
    "a gigabyte announced": (sends(OK + b"Content-Length: 1073741824\r\n\r\nab"), True),
    "two lengths": (sends(OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\na"), False),
    "an invalid length": (sends(OK + b"Content-Length: many\r\n\r\n"), False),
    "not HTTP": (sends(b"220 mail.example.com ESMTP\r\n"), False),
    "HTTP/0.9": (sends(b"<html>hello</html>"), False),
    "HTTP/2 only": (sends(b"\0\0\x12\x04\0\0\0\0\0"), False),
    "an invalid status": (sends(b"HTTP/1.1 abc OK\r\n\r\n"), False),
    "status 99": (sends(b"HTTP/1.1 99 Low\r\nContent-Length: 0\r\n\r\n"), False),
    "status 1000": (sends(b"HTTP/1.1 1000 High\r\nContent-Length: 0\r\n\r\n"), False),
    "100 for ever": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), False),
    "101": (hangs_after(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), False),
    "redirects elsewhere": (
        sends(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n"),
        False,
    ),
    "redirects to itself": (sends(b"HTTP/1.1 307 Temporary\r\nLocation: /hook\r\nContent-Length: 0\r\n\r\n"), False),
    "not modified": (sends(b"HTTP/1.1 304 Not Modified\r\n\r\n"), False),
    "a null in a header": (sends(OK + b"X-A: \0\r\nContent-Length: 0\r\n\r\n"), False),
    "204 with a body": (sends(b"HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\nabc"), True),
    "an interim response first": (sends(b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK + b"Content-Length: 0\r\n\r\n"), True),
}


@contextmanager
def receiving(behave: Behaviour, context: ssl.SSLContext | None = None, times: int = 1) -> Iterator[str]:
    """Yield the URL of a receiver that accepts `times` connections, one after the other."""

    def serve() -> None:
        for _ in range(times):
            with contextlib.suppress(OSError):
                accepted, _ = listener.accept()
                with accepted if context is None else context.wrap_socket(accepted, server_side=True) as connection:
                    # Longer than the server waits. A connection that is never closed fails the test.
                    connection.settimeout(30)
                    behave(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        scheme = "http" if context is None else "https"
        try:
            yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/hook"
        except BaseException:
            # Do not wait for connections that never came.
            listener.shutdown(socket.SHUT_RDWR)
            raise
        thread.join(40)
        assert not thread.is_alive()


def check_attempt(components: Components, url: str, *, is_success: bool) -> None:
    """Make one attempt; check that it succeeded, or that the retry is due exactly as scheduled."""
    finish_job(components, webhook_url=url)
    send_after_restart(components)
    attempt, due_at, delivered_at, error = delivery(components)
    assert attempt == 1
    if is_success:
        assert (due_at, delivered_at, error) == (None, components.clock.now, None)
    else:
        assert (due_at, delivered_at) == (components.clock.now + DELAYS[0], None)
        assert error


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_one_attempt_at_a_bad_receiver(components: Components, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.webhooks.delivery.TIMEOUT", TIMEOUT)
    behave, is_success = BEHAVIOURS[name]
    with receiving(behave) as url:
        check_attempt(components, url, is_success=is_success)


def test_there_are_at_least_32_behaviours() -> None:
    assert len(BEHAVIOURS) >= 32


@pytest.mark.soak
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_all_attempts_at_a_bad_receiver(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all eleven attempts, each exactly when it is due; if attempts succeed, make eleven separate deliveries."""
    monkeypatch.setattr("server.webhooks.delivery.TIMEOUT", TIMEOUT)
    behave, is_success = BEHAVIOURS[name]
    attempts = 1 + len(DELAYS)
    with receiving(behave, times=attempts) as url:
        if is_success:
            for number in range(attempts):
                with open_components(tmp_path / str(number)) as components:
                    check_attempt(components, url, is_success=True)
            return
        with open_components(tmp_path) as components:
            finish_job(components, webhook_url=url)
            for number, delay in enumerate((*DELAYS, None), 1):
                send_after_restart(components)
                attempt, due_at, delivered_at, error = delivery(components)
                assert (attempt, delivered_at) == (number, None)
                assert due_at == (delay and components.clock.now + delay)
                assert error
                # One second early, nothing is due. The receiver accepts no connection beyond the attempts.
                components.clock.now += (delay or 3600) - 1
                assert send_after_restart(components) == (1 if delay else 60)
                components.clock.now += 1


#: Responses that never end, one for each part that can be endless.
ENDLESS = [name for name in BEHAVIOURS if "endless" in name or name == "100 for ever"]
#: The most bytes that are sent but not read: the buffers of the server and of the receiver, and one chunk.
MAX_BUFFERED = 2**16


@pytest.mark.parametrize("name", ENDLESS)
def test_at_most_64_kib_of_an_endless_response_are_read(
    components: Components, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server reads at most 64 KiB. The receiver has the smallest possible send buffer and counts what it sends."""
    behave, is_success = BEHAVIOURS[name]
    num_sent = 0

    class CountingConnection:
        """A connection that counts the bytes sent."""

        def __init__(self, connection: socket.socket) -> None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            self._connection = connection
            self.recv = connection.recv

        def sendall(self, part: bytes) -> None:
            nonlocal num_sent
            while part:
                number = self._connection.send(part)
                num_sent, part = num_sent + number, part[number:]

    num_read, read = 0, AnyIOStream.read

    async def counting_read(stream: AnyIOStream, *limits: Any) -> bytes:
        nonlocal num_read
        data = await read(stream, *limits)
        num_read += len(data)
        return data

    monkeypatch.setattr(AnyIOStream, "read", counting_read)
    with receiving(lambda connection: behave(CountingConnection(connection))) as url:  # type: ignore[arg-type]
        check_attempt(components, url, is_success=is_success)
    assert 0 < num_read <= 65_536
    assert num_read <= num_sent <= num_read + MAX_BUFFERED


def test_a_self_signed_certificate_fails_the_delivery(components: Components, tmp_path: Path) -> None:
    files = tls.ensure_certificate(tmp_path / "stranger", "127.0.0.1", "")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    with receiving(sends(OK + b"Content-Length: 0\r\n\r\n"), context) as url:
        check_attempt(components, url, is_success=False)


def test_plain_http_on_an_https_url_fails_the_delivery(components: Components) -> None:
    with receiving(sends(OK + b"Content-Length: 0\r\n\r\n")) as url:
        check_attempt(components, url.replace("http:", "https:"), is_success=False)
