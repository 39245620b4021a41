"""The null model behind BentoML: `bentoml serve bench.peer_servers.with_bentoml:Null`."""

import threading
from typing import Any

import bentoml

from bench.peer_servers.null import GenerationRequest, respond


@bentoml.service(logging={"access": {"enabled": False}})
class Null:
    """A service with a route that responds at once, and a task that BentoML stores in its database until it is done."""

    @bentoml.api(input_spec=GenerationRequest)
    def generate(self, **fields: Any) -> dict[str, Any]:
        """Return the null response."""
        return respond(GenerationRequest.model_construct(**fields))

    @bentoml.task(input_spec=GenerationRequest)
    def hold(self, **fields: Any) -> dict[str, Any]:
        """Block for ever, so that other tasks wait as they do behind a busy model."""
        threading.Event().wait()
        return respond(GenerationRequest.model_construct(**fields))
