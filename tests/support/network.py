"""A network of its own, where every address of the world leads to this machine and all that is tried is heard.

`inside` runs a program of tests/support/network_programs.py there; the rest is for such programs.
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

#: Rights over nothing but the new network and its own view of the files: nobody has to be root for it.
_UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--mount", "--")
#: Nobody's addresses, by RFC 5737 and 5735: where names are asked for, and where the packets go that mark an end.
RESOLVER, _MARK = "192.0.2.53", "192.0.2.9"
#: A host on the public web, as far as anybody here can tell.
PUBLIC = "93.184.216.34"
_ALL_PROTOCOLS = 3
_SOL_PACKET, _PACKET_STATISTICS, _OUTGOING = 263, 6, 4
_A, _AAAA = 1, 28


@functools.cache
def _lacking() -> str:
    """What this machine lacks; nothing where it can have such a network."""
    for name in ("unshare", "ip"):
        if not shutil.which(name):
            return f"there is no {name}"
    probe = "ip link set lo up && ip route add local 0.0.0.0/0 dev lo && ip -6 route add local ::/0 dev lo"
    done = subprocess.run([*_UNSHARE, "sh", "-c", probe], capture_output=True, text=True, timeout=30)
    return f"no network namespace: {done.stderr.strip()}" if done.returncode else ""


def inside(program: str, *arguments: object) -> Any:
    """What this program says, run in a network of its own; skips where there can be none."""
    if reason := _lacking():
        pytest.skip(reason)
    command = [*_UNSHARE, sys.executable, "-m", "tests.support.network_programs", program, *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            said, complaints = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            # With the server that it started.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, complaints
    return json.loads(said)


def lead_everything_here() -> None:
    """Every address is one of this machine, and names are asked for at one of them."""
    for command in (
        "ip link set lo up",
        "ip route add local 0.0.0.0/0 dev lo",
        "ip -6 route add local ::/0 dev lo",
    ):
        subprocess.run(command.split(), check=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {"resolv.conf": f"nameserver {RESOLVER}\n", "nsswitch.conf": "hosts: files dns\n"}.items():
            told = Path(folder) / name
            told.write_text(text)
            subprocess.run(["mount", "--bind", told, f"/etc/{name}"], check=True)


class Wire:
    """Every TCP connection and UDP packet that is tried, whether anybody listens there or not."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ALL_PROTOCOLS))
        self._tried: set[str] = set()
        self._changed = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            packet, (_, _, kind, *_) = self._socket.recvfrom(256)
            # What is sent over loopback is heard twice.
            if kind == _OUTGOING and (found := _attempt(packet)):
                with self._changed:
                    self._tried.add(found)
                    self._changed.notify_all()

    def tried(self) -> set[str]:
        """All up to now, such as "tcp 10.0.0.1 80". Raises when some were missed."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind(("127.0.0.1", 0))
            port = sender.getsockname()[1]
            sender.sendto(b"", (_MARK, port))
        mark = f"udp {_MARK} {port}"
        with self._changed:
            assert self._changed.wait_for(lambda: mark in self._tried, 10)
            found = {each for each in self._tried if f" {_MARK} " not in each}
        _, dropped = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        assert not dropped
        return found


def _attempt(packet: bytes) -> str | None:
    """What a packet begins; answers begin nothing."""
    is_four = packet[0] >> 4 == 4
    protocol, start = (packet[9], (packet[0] & 15) * 4) if is_four else (packet[6], 40)
    address = ipaddress.ip_address(packet[16:20] if is_four else packet[24:40])
    from_port, port = struct.unpack("!HH", packet[start : start + 4])
    if protocol == socket.IPPROTO_UDP and from_port != 53:
        return f"udp {address} {port}"
    # SYN without ACK.
    if protocol == socket.IPPROTO_TCP and packet[start + 13] & 0b10010 == 0b00010:
        return f"tcp {address} {port}"
    return None


class Resolver:
    """Answers for the names it is given: each with one answer after the other, the last one from then on."""

    def __init__(self, names: Mapping[str, Sequence[Sequence[str]]]) -> None:
        self._names = names
        self._given: dict[tuple[str, int], int] = {}
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((RESOLVER, 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            query, client = self._socket.recvfrom(4096)
            self._socket.sendto(self._answer(query), client)

    def _answer(self, query: bytes) -> bytes:
        labels, place = list[str](), 12
        while length := query[place]:
            labels.append(query[place + 1 : place + 1 + length].decode())
            place += 1 + length
        name, (kind,) = ".".join(labels).lower(), struct.unpack("!H", query[place + 1 : place + 3])
        question, turns = query[12 : place + 5], self._names.get(name, ())
        turn = self._given.get((name, kind), 0)
        self._given[name, kind] = turn + 1
        given = turns[min(turn, len(turns) - 1)] if turns else ()
        found = [address for each in given if _kind(address := ipaddress.ip_address(each)) == kind]
        # Each refers to the name in the question, and may not be kept.
        records = [struct.pack("!HHHIH", 0xC00C, kind, 1, 0, len(address.packed)) + address.packed for address in found]
        status = 0x8180 if turns else 0x8183
        return query[:2] + struct.pack("!HHHHH", status, 1, len(records), 0, 0) + question + b"".join(records)


def _kind(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> int:
    return _A if address.version == 4 else _AAAA


class _Canary(BaseHTTPRequestHandler):
    """The web server at every address."""

    asked: ClassVar[list[str]] = []
    files: ClassVar[Mapping[str, bytes]] = {}

    def do_GET(self) -> None:
        """A file that was given, or /to?URL, which is somewhere else."""
        self._note()
        if self.path.startswith("/to?"):
            self.send_response(302)
            # As it is, also where it is not ASCII.
            self.send_header("location", unquote(self.path.removeprefix("/to?")).encode().decode("latin-1"))
            return self._end(b"")
        self.send_response(200 if self.path in self.files else 404)
        return self._end(self.files.get(self.path, b""))

    def do_POST(self) -> None:
        """A receiver of webhooks."""
        self._note()
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self._end(b"")

    def _note(self) -> None:
        address = self.connection.getsockname()[0].removeprefix("::ffff:")
        self.asked.append(f"{self.command} {address} {self.path}")

    def _end(self, content: bytes) -> None:
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


class _Listener(ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 128


@contextmanager
def canary(files: Mapping[str, bytes]) -> Iterator[list[str]]:
    """A web server on port 80 of every address; what it was asked, such as "GET 10.0.0.1 /"."""
    _Canary.files = files
    with _Listener(("::", 80), _Canary) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            yield _Canary.asked
        finally:
            listener.shutdown()
            thread.join()
