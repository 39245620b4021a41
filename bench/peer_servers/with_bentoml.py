"""The null model behind BentoML: `bentoml serve bench.peer_servers.with_bentoml:Null`."""

import threading
from typing import Any

import bentoml

from bench.peer_servers.null import Wish, paint


@bentoml.service(logging={"access": {"enabled": False}})
class Null:
    """A route that answers, and a task that is kept in BentoML's own database until it is done."""

    @bentoml.api(input_spec=Wish)
    def generate(self, **fields: Any) -> dict[str, Any]:
        """Paint it."""
        return paint(Wish.model_construct(**fields))

    @bentoml.task(input_spec=Wish)
    def hold(self, **fields: Any) -> dict[str, Any]:
        """Never come to an end, so that the others wait as they do behind a model at work."""
        threading.Event().wait()
        return paint(Wish.model_construct(**fields))
