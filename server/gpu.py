"""What an operator is told of one GPU, in the server's own process or anywhere in the cluster."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.base import About


@dataclass(frozen=True)
class Gpu:
    """One worker and the device it paints on.

    Attributes:
        name: its number.
        state: "waiting" for a GPU to be free in the cluster, "loading", "ready" or "leaving".
        node: the machine's address; empty for the server's own process.
        num_running: requests that it has.
        num_restarts: how often it was started again because it was lost.
        engines: what there is to tell of its engines, by their weights.
        failure: why the last runner there ended, until the next one is ready.
    """

    name: str
    state: str
    node: str = ""
    num_running: int = 0
    num_restarts: int = 0
    engines: Mapping[str, About] = field(default_factory=dict)
    failure: str = ""
