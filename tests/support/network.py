"""A separate network in which every address leads to this machine and each attempt to connect is recorded.

`run_in_network` runs a program of tests/support/network_programs.py there. The rest of this module serves the programs.
"""

import functools
import ipaddress
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import pytest

from tests.support.server_process import ROOT

#: A user namespace with rights over the new network and mount namespaces only, so it needs no root.
_UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--mount", "--")
#: The addresses of the DNS resolver and of packets used as marks. Both are reserved for documentation (RFC 5737).
RESOLVER, _MARK = "192.0.2.53", "192.0.2.9"
#: An address that the server takes for a public host.
PUBLIC = "93.184.216.34"
_ALL_PROTOCOLS = 3
_SOL_PACKET, _PACKET_STATISTICS, _OUTGOING = 263, 6, 4
_A, _AAAA = 1, 28


@functools.cache
def _missing_requirement() -> str:
    """Return what this machine lacks for a separate network; empty if it lacks nothing."""
    for name in ("unshare", "ip"):
        if not shutil.which(name):
            return f"{name} is not installed"
    probe = "ip link set lo up && ip route add local 0.0.0.0/0 dev lo && ip -6 route add local ::/0 dev lo"
    process = subprocess.run([*_UNSHARE, "sh", "-c", probe], capture_output=True, text=True, timeout=30)
    return f"cannot create a network namespace: {process.stderr.strip()}" if process.returncode else ""


def run_in_network(program: str, *arguments: object) -> Any:
    """Run a program in a separate network; return the JSON it prints. Skip the test if that is not possible."""
    if reason := _missing_requirement():
        pytest.skip(reason)
    command = [*_UNSHARE, sys.executable, "-m", "tests.support.network_programs", program, *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            # Kill the whole session: the program and the server that it started.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, errors
    return json.loads(output)


def route_everything_here() -> None:
    """Make every address lead to this machine, and make programs look names up at RESOLVER."""
    for command in (
        "ip link set lo up",
        "ip route add local 0.0.0.0/0 dev lo",
        "ip -6 route add local ::/0 dev lo",
    ):
        subprocess.run(command.split(), check=True)
    with tempfile.TemporaryDirectory() as directory:
        for name, text in {"resolv.conf": f"nameserver {RESOLVER}\n", "nsswitch.conf": "hosts: files dns\n"}.items():
            path = Path(directory) / name
            path.write_text(text)
            subprocess.run(["mount", "--bind", path, f"/etc/{name}"], check=True)


class TrafficRecorder:
    """A recorder of every attempted TCP connection and UDP packet, whether a listener exists or not."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ALL_PROTOCOLS))
        self._tried: set[str] = set()
        self._changed = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            packet, (_, _, kind, *_) = self._socket.recvfrom(256)
            # A packet over loopback appears twice, as outgoing and as incoming.
            if kind == _OUTGOING and (attempt := _attempt(packet)):
                with self._changed:
                    self._tried.add(attempt)
                    self._changed.notify_all()

    def attempts(self) -> set[str]:
        """Return all attempts up to now, such as "tcp 10.0.0.1 80". Fail if the recorder missed packets."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind(("127.0.0.1", 0))
            port = sender.getsockname()[1]
            sender.sendto(b"", (_MARK, port))
        mark = f"udp {_MARK} {port}"
        with self._changed:
            assert self._changed.wait_for(lambda: mark in self._tried, 10)
            attempts = {each for each in self._tried if f" {_MARK} " not in each}
        _, dropped = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        assert not dropped
        return attempts


def _attempt(packet: bytes) -> str | None:
    """Describe the TCP connection or UDP exchange that a packet starts; return None for every other packet."""
    is_ipv4 = packet[0] >> 4 == 4
    protocol, start = (packet[9], (packet[0] & 15) * 4) if is_ipv4 else (packet[6], 40)
    address = ipaddress.ip_address(packet[16:20] if is_ipv4 else packet[24:40])
    from_port, port = struct.unpack("!HH", packet[start : start + 4])
    if protocol == socket.IPPROTO_UDP and from_port != 53:
        return f"udp {address} {port}"
    # SYN without ACK.
    if protocol == socket.IPPROTO_TCP and packet[start + 13] & 0b10010 == 0b00010:
        return f"tcp {address} {port}"
    return None


class Resolver:
    """A DNS resolver of the given names: each lookup gets the next list of addresses, and the last list is repeated."""

    def __init__(self, names: Mapping[str, Sequence[Sequence[str]]]) -> None:
        self._names = names
        self._num_lookups: dict[tuple[str, int], int] = {}
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((RESOLVER, 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            query, client = self._socket.recvfrom(4096)
            self._socket.sendto(self._answer(query), client)

    def _answer(self, query: bytes) -> bytes:
        labels, offset = list[str](), 12
        while length := query[offset]:
            labels.append(query[offset + 1 : offset + 1 + length].decode())
            offset += 1 + length
        name, (kind,) = ".".join(labels).lower(), struct.unpack("!H", query[offset + 1 : offset + 3])
        question, turns = query[12 : offset + 5], self._names.get(name, ())
        turn = self._num_lookups.get((name, kind), 0)
        self._num_lookups[name, kind] = turn + 1
        answer = turns[min(turn, len(turns) - 1)] if turns else ()
        found = [address for each in answer if _record_type(address := ipaddress.ip_address(each)) == kind]
        # Each record points back to the name in the question, and a TTL of 0 forbids caching.
        records = [struct.pack("!HHHIH", 0xC00C, kind, 1, 0, len(address.packed)) + address.packed for address in found]
        status = 0x8180 if turns else 0x8183
        return query[:2] + struct.pack("!HHHHH", status, 1, len(records), 0, 0) + question + b"".join(records)


def _record_type(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> int:
    return _A if address.version == 4 else _AAAA


class _Canary(BaseHTTPRequestHandler):
    """A handler that records and answers all requests, to whatever address they go."""

    requests: ClassVar[list[str]] = []
    files: ClassVar[Mapping[str, bytes]] = {}

    def do_GET(self) -> None:
        """Send one of `files`, or redirect /to?URL to the URL."""
        self._record()
        if self.path.startswith("/to?"):
            self.send_response(302)
            # Send the URL unchanged, even if it is not ASCII.
            self.send_header("location", unquote(self.path.removeprefix("/to?")).encode().decode("latin-1"))
            return self._send_body(b"")
        self.send_response(200 if self.path in self.files else 404)
        return self._send_body(self.files.get(self.path, b""))

    def do_POST(self) -> None:
        """Accept a webhook."""
        self._record()
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self._send_body(b"")

    def _record(self) -> None:
        address = self.connection.getsockname()[0].removeprefix("::ffff:")
        self.requests.append(f"{self.command} {address} {self.path}")

    def _send_body(self, content: bytes) -> None:
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


class _Listener(ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 128


@contextmanager
def catch_all_server(files: Mapping[str, bytes]) -> Iterator[list[str]]:
    """Run a web server on port 80 of every address; yield its list of requests, such as "GET 10.0.0.1 /"."""
    _Canary.files = files
    with _Listener(("::", 80), _Canary) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            yield _Canary.requests
        finally:
            listener.shutdown()
            thread.join()
