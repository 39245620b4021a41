"""The null model behind LitServe: `python -m bench.peer_servers.with_litserve PORT`."""

import sys
from typing import Any

import litserve

from bench.peer_servers.null import GenerationRequest, respond


class Null(litserve.LitAPI):  # type: ignore[misc]
    """A LitServe API. The annotation of `decode_request` makes LitServe validate; `predict` runs in another process."""

    def setup(self, device: str) -> None:
        """Load nothing."""

    def decode_request(self, request: GenerationRequest) -> GenerationRequest:
        """Return the validated request unchanged."""
        return request

    def predict(self, inputs: GenerationRequest) -> dict[str, Any]:
        """Return the null response."""
        return respond(inputs)


if __name__ == "__main__":
    server = litserve.LitServer(Null(api_path="/generate"), accelerator="cpu")
    server.run("127.0.0.1", int(sys.argv[1]), log_level="warning", access_log=False, generate_client_file=False)
