"""A web server of the attacker's on loopback: LoRA files to be downloaded, and a receiver that refuses webhooks."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection as Pipe
from pathlib import Path


class _Handler(SimpleHTTPRequestHandler):
    """Names no ETag, so that a file comes anew each time."""

    def do_POST(self) -> None:
        """A webhook: refused, so that it stays due."""
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_error(500)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  its base's word
        """Say nothing."""


@contextmanager
def hosting(folder: Path) -> Iterator[str]:
    """The address of a server of this folder, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_host, args=(there, folder), daemon=True)
    process.start()
    # So that the end of the process is heard here.
    there.close()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.kill()
        process.join()


def _host(pipe: Pipe, folder: Path) -> None:
    os.nice(19)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        pipe.send(server.server_address[1])
        server.serve_forever()
