"""The address to which fal sends finished stickers."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import stickers


#: The request id of each webhook that came.
received: list[str] = []


class Handler(BaseHTTPRequestHandler):
    """POST / takes a webhook of fal."""

    def do_POST(self) -> None:
        """Deliver the sticker."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        stickers.deliver(body["request_id"], body["payload"])
        received.append(body["request_id"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def open_server() -> ThreadingHTTPServer:
    """Listen on a free port of this machine."""
    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)
