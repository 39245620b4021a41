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


class StepTimes(TypedDict):
    """The forward passes with one size and one acceleration since the start; each is a step of one or more images."""

    size: Annotated[str, Field(description="The width and height, such as 1024x768, or other if it is no preset.")]
    acceleration: Annotated[str, Field(description="The acceleration of the forward passes.")]
    count: Annotated[int, Field(description="The number of forward passes.")]
    seconds: Annotated[float, Field(description="The mean time of a forward pass in seconds.")]


class ServerStatus(TypedDict):
    """The data of the status page."""

    version: Annotated[str, Field(description="The version of flux-server.")]
    is_ready: bool
    loading: Annotated[dict[str, Any] | None, Field(description="The progress of loading, until the server is ready.")]
    served: Annotated[list[str], Field(description="The endpoints.")]
    now: Annotated[dict[str, float], Field(description="The gauges of /metrics.")]
    gpus: Annotated[list[dict[str, Any]], Field(description="The state of each GPU.")]
    steps: Annotated[
        list[StepTimes], Field(description="The forward passes since the start, by size and acceleration.")
    ]
    minutes: Annotated[list[dict[str, Any]], Field(description="The requests of each minute of the last hour.")]
    endpoints: Annotated[
        list[dict[str, Any]], Field(description="The successful requests of the last hour by endpoint.")
    ]
    times: Annotated[
        list[dict[str, Any]],
        Field(description="The generation times of the last day in seconds, by size and acceleration."),
    ]
    fal_price: Annotated[float, Field(description="The operator's setting of fal's price of a megapixel; 0 if unset.")]
    failures: Annotated[
        list[dict[str, Any]], Field(description="The last requests that failed with a status of 500 or more.")
    ]
    usage: Annotated[list[dict[str, Any]], Field(description="The usage of the last 30 days by key.")]
