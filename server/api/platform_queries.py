"""Query parameters and bodies of fal's platform API."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field


def _separated(value: object) -> object:
    return [part for each in value for part in str(each).split(",") if part] if isinstance(value, list) else value


Endpoints = Annotated[list[str], BeforeValidator(_separated)]


class RequestsQuery(BaseModel):
    """fal's parameters for finished requests. Unlike at fal, endpoint_id is optional; the default is all endpoints."""

    endpoint_id: Endpoints = Field([], max_length=50)
    limit: int = Field(50, ge=1, le=100)
    cursor: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    status: Literal["success", "error", "user_error"] | None = None
    request_id: str | None = None
    expand: Annotated[list[Literal["payloads"]], BeforeValidator(_separated)] = []
    sort_by: Literal["ended_at"] = "ended_at"


class ModelsQuery(BaseModel):
    """fal's parameters for its model search. `cursor` is the index of the page's first model."""

    endpoint_id: Endpoints = Field([], max_length=50)
    q: str = ""
    category: str | None = None
    status: Literal["active", "deprecated"] | None = None
    expand: Annotated[list[Literal["openapi-3.0", "enterprise_status"]], BeforeValidator(_separated)] = []
    limit: int = Field(50, ge=1, le=100)
    cursor: int = Field(0, ge=0)


class PricingQuery(BaseModel):
    """fal's parameters for prices."""

    endpoint_id: Endpoints = Field(min_length=1, max_length=50)


class UsageQuery(BaseModel):
    """fal's parameters for usage. This server counts usage by day, in UTC."""

    endpoint_id: Endpoints = Field([], max_length=50)
    start: datetime | None = None
    end: datetime | None = None
    timeframe: Literal["day"] = "day"
    timezone: Literal["UTC"] = "UTC"
    bound_to_timeframe: bool = True
    expand: Annotated[list[Literal["time_series", "summary", "auth_method"]], BeforeValidator(_separated)] = []


class Estimate(BaseModel):
    """A planned number of calls or units for each endpoint."""

    estimate_type: Literal["historical_api_price", "unit_price"]
    endpoints: dict[str, dict[str, float]] = Field(min_length=1, max_length=50)
