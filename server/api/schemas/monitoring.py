"""Types of the responses about the server's state."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict


class Health(TypedDict):
    """A sign that the server is alive."""

    status: Literal["alive"]
    version: Annotated[str, Field(description="The version of flux-server.")]


class Readiness(TypedDict):
    """Whether the server can generate images, and its progress while it loads weights."""

    status: Literal["ready", "loading", "stopping"]
    version: Annotated[str, Field(description="The version of flux-server.")]
    component: NotRequired[Annotated[str, Field(description="The part of the weights that is loading.")]]
    loaded_bytes: NotRequired[int]
    total_bytes: NotRequired[int]


class ServerStatus(TypedDict):
    """The data of the status page."""

    version: Annotated[str, Field(description="The version of flux-server.")]
    is_ready: bool
    loading: Annotated[dict[str, Any] | None, Field(description="The progress of loading, until the server is ready.")]
    served: Annotated[list[str], Field(description="The endpoints.")]
    now: Annotated[dict[str, float], Field(description="The gauges of /metrics.")]
    gpus: Annotated[list[dict[str, Any]], Field(description="The state of each GPU.")]
    steps: Annotated[Any, Field(description="How many steps ran, by endpoint.")]
    minutes: Annotated[list[dict[str, Any]], Field(description="The requests of each minute of the last hour.")]
    endpoints: Annotated[list[dict[str, Any]], Field(description="The requests of the last hour by endpoint.")]
    failures: Annotated[list[dict[str, Any]], Field(description="The last requests that failed.")]
    usage: Annotated[list[dict[str, Any]], Field(description="The usage of the last 30 days by key.")]
