"""The attacker's web server on loopback, which offers LoRA files for download and refuses webhooks."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection as Pipe
from pathlib import Path


class _Handler(SimpleHTTPRequestHandler):
    """A request handler that sends no ETag, so that the server downloads a file again each time."""

    def do_POST(self) -> None:
        """Refuse a webhook, so that the server has to send it again later."""
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_error(500)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name in the base class
        """Log nothing."""


@contextmanager
def hosting(directory: Path) -> Iterator[str]:
    """Serve this directory from a separate process; yield the URL."""
    context = multiprocessing.get_context("spawn")
    parent_pipe, child_pipe = context.Pipe()
    process = context.Process(target=_host, args=(child_pipe, directory), daemon=True)
    process.start()
    # Close the copy of the child's end in this process, so that reading fails if the child ends.
    child_pipe.close()
    try:
        yield f"http://127.0.0.1:{parent_pipe.recv()}"
    finally:
        process.kill()
        process.join()


def _host(pipe: Pipe, directory: Path) -> None:
    os.nice(19)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(directory))) as server:
        pipe.send(server.server_address[1])
        server.serve_forever()
