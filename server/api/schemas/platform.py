"""Types of the responses of fal's platform API."""

from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict


class Page(TypedDict):
    """The position of a page in a list."""

    next_cursor: Annotated[str | None, Field(description="The cursor of the next page; null on the last one.")]
    has_more: Annotated[bool, Field(description="Whether there is a next page.")]


class ModelMetadata(TypedDict):
    """The facts about an endpoint."""

    display_name: str
    category: Annotated[str, Field(examples=["text-to-image"])]
    description: str
    status: Annotated[str, Field(examples=["active"])]
    tags: list[str]
    updated_at: str
    date: str
    is_favorited: bool
    thumbnail_url: str
    model_url: str
    highlighted: bool
    pinned: bool


class ListedModel(TypedDict):
    """An endpoint of the server."""

    endpoint_id: Annotated[str, Field(examples=["fal-ai/flux/dev"])]
    metadata: ModelMetadata
    openapi: NotRequired[Annotated[dict[str, Any], Field(description="The OpenAPI document of the endpoint's queue.")]]


class ModelPage(Page):
    """A page of endpoints."""

    models: list[ListedModel]


class Price(TypedDict):
    """The price of an endpoint."""

    endpoint_id: str
    unit_price: Annotated[float, Field(description="Always 0.")]
    unit: str
    currency: str


class PricePage(Page):
    """Prices of endpoints."""

    prices: list[Price]


class CostEstimate(TypedDict):
    """The estimated cost of planned calls."""

    estimate_type: str
    total_cost: Annotated[float, Field(description="Always 0.")]
    currency: str


class UsageLine(TypedDict):
    """The usage of one endpoint."""

    endpoint_id: str
    unit: str
    quantity: Annotated[float, Field(description="The number of units.")]
    unit_price: float
    cost: float
    currency: str
    auth_method: str


class UsageBucket(TypedDict):
    """The usage of one day, in UTC."""

    bucket: Annotated[str, Field(description="The start of the day, as an ISO 8601 time.")]
    results: list[UsageLine]


class UsagePage(Page):
    """A key's usage."""

    time_series: NotRequired[Annotated[list[UsageBucket], Field(description="The usage by day and endpoint.")]]
    summary: NotRequired[Annotated[list[UsageLine], Field(description="The usage by endpoint.")]]


class WorkflowPage(Page):
    """An empty list of workflows."""

    workflows: list[dict[str, Any]]


class FinishedRequest(TypedDict):
    """A finished request."""

    request_id: str
    endpoint_id: str
    sent_at: str
    started_at: str | None
    ended_at: str
    status_code: Annotated[int, Field(description="The HTTP status of the result.")]
    duration: Annotated[float, Field(description="The seconds from the submit to the end.")]
    json_input: NotRequired[Annotated[Any, Field(description="The input, with expand=payloads.")]]
    json_output: NotRequired[Annotated[Any, Field(description="The output, with expand=payloads.")]]


class RequestPage(Page):
    """A page of finished requests, the newest first."""

    items: list[FinishedRequest]
