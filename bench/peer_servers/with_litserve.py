"""The null model behind LitServe: `python -m bench.peer_servers.with_litserve PORT`."""

import sys
from typing import Any

import litserve

from bench.peer_servers.null import Wish, paint


class Null(litserve.LitAPI):  # type: ignore[misc]
    """LitServe validates what `decode_request` says it takes, and predicts in a process of its own."""

    def setup(self, device: str) -> None:
        """Load nothing."""

    def decode_request(self, request: Wish) -> Wish:
        """As it came."""
        return request

    def predict(self, wish: Wish) -> dict[str, Any]:
        """Paint it."""
        return paint(wish)


if __name__ == "__main__":
    server = litserve.LitServer(Null(api_path="/generate"), accelerator="cpu")
    server.run("127.0.0.1", int(sys.argv[1]), log_level="warning", access_log=False, generate_client_file=False)
