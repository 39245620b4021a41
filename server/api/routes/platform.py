"""fal's platform API, as on api.fal.ai: models, prices, usage, and a key's finished requests.

Under the host api.fal.ai, and through the proxies, /v1/... is rewritten to /platform/v1/..., because under every other
host name /v1/models belongs to OpenAI's API.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ValidationError

from models.base import Model
from models.schema import MAX_PROMPT_LENGTH
from server.api import fal_openapi, validation
from server.api.dependencies import authenticate, get_model, get_services, read_when_room
from server.api.middleware.rewrite import PLATFORM
from server.api.operations import json_body, query_parameters
from server.api.platform_queries import Estimate, ModelsQuery, PricingQuery, RequestsQuery, UsageQuery
from server.api.responses import FalJSONResponse
from server.api.schemas.platform import (
    CostEstimate,
    ListedModel,
    ModelMetadata,
    ModelPage,
    Page,
    Price,
    PricePage,
    RequestPage,
    UsageBucket,
    UsageLine,
    UsagePage,
    WorkflowPage,
)
from server.errors import InvalidInput
from server.net.bytes_in_flight import SMALL
from server.queue.history import HistoryQuery
from server.queue.usage import UsageFilter, UsageRow

router = APIRouter(tags=["platform"])

#: How far back a query looks by default, and how far back a query for a single request looks. Both are as at fal.
DEFAULT_WINDOW, SINGLE_REQUEST_WINDOW = timedelta(days=1), timedelta(days=90)
#: Unit and currency of prices, which are all zero.
UNIT, CURRENCY = "megapixels", "USD"
_MODELS = f"{PLATFORM}/v1/models"
#: Estimated bytes of one request in a list with payloads: both the input and the output contain the prompt.
_ITEM_BYTES = 2 * MAX_PROMPT_LENGTH
#: The time that all models report as their last update: when the server started.
_SINCE = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

Q = TypeVar("Q", bound=BaseModel)


@router.get(
    _MODELS,
    summary="List the endpoints",
    response_model=ModelPage,
    openapi_extra=query_parameters(ModelsQuery),
)
async def models(request: Request) -> Response:
    """Return a page of the endpoints that are served, filtered by id, search words, category and status."""
    authenticate(request)
    query = _read(request, ModelsQuery)
    by_name = get_services(request).models
    candidates = [get_model(request, name) for name in query.endpoint_id] or [by_name[name] for name in sorted(by_name)]
    matches = [model for model in candidates if _fits(model, query)]
    page, rest = matches[query.cursor : query.cursor + query.limit], matches[query.cursor + query.limit :]
    items = [_model(model, request.state.base_url, has_openapi="openapi-3.0" in query.expand) for model in page]
    return FalJSONResponse(ModelPage(models=items, **_paging(str(query.cursor + query.limit) if rest else None)))


@router.get(
    f"{_MODELS}/pricing",
    summary="Get the prices of endpoints",
    response_model=PricePage,
    openapi_extra=query_parameters(PricingQuery),
)
async def pricing(request: Request) -> Response:
    """Return the price of a megapixel, which is always zero, for each requested endpoint."""
    authenticate(request)
    names = [get_model(request, name).endpoint for name in _read(request, PricingQuery).endpoint_id]
    prices = [Price(endpoint_id=name, unit_price=0.0, unit=UNIT, currency=CURRENCY) for name in names]
    return FalJSONResponse(PricePage(prices=prices, **_paging()))


@router.post(
    f"{_MODELS}/pricing/estimate",
    summary="Estimate the cost of calls",
    response_model=CostEstimate,
    openapi_extra=json_body(Estimate),
)
async def estimate(request: Request) -> Response:
    """Estimate the cost of calls or units, which is always zero."""
    async with get_services(request).in_flight.body(request, authenticate(request), SMALL) as body:
        plan = validation.parse_body(Estimate, body)
    for name in plan.endpoints:
        get_model(request, name)
    return FalJSONResponse(CostEstimate(estimate_type=plan.estimate_type, total_cost=0.0, currency=CURRENCY))


@router.get(
    f"{_MODELS}/usage",
    summary="Get the usage of your key",
    response_model=UsagePage,
    openapi_extra=query_parameters(UsageQuery),
)
async def usage(request: Request) -> Response:
    """Return this key's usage in megapixels, by day and endpoint; `expand=summary` returns totals by endpoint."""
    owner = authenticate(request)
    query = _read(request, UsageQuery)
    end = query.end or datetime.now(UTC)
    start = query.start or end - DEFAULT_WINDOW
    usage_filter = UsageFilter(owner, _utc(start).date(), _utc(end).date(), query.endpoint_id)
    rows = await get_services(request).executor.run(owner, get_services(request).usage, usage_filter)
    body = UsagePage(next_cursor=None, has_more=False)
    if "time_series" in query.expand or "summary" not in query.expand:
        body["time_series"] = _time_series(rows)
    if "summary" in query.expand:
        names = sorted({row.endpoint for row in rows})
        body["summary"] = [_line(name, [row for row in rows if row.endpoint == name]) for name in names]
    return FalJSONResponse(body)


@router.get(f"{PLATFORM}/v1/workflows", summary="List the workflows", response_model=WorkflowPage)
async def workflows(request: Request) -> Response:
    """Return an empty list, because this server has no saved workflows."""
    authenticate(request)
    return FalJSONResponse(WorkflowPage(workflows=[], **_paging()))


@router.get(
    f"{_MODELS}/requests/by-endpoint",
    summary="List your finished requests",
    response_model=RequestPage,
    openapi_extra=query_parameters(RequestsQuery),
)
@router.get("/v1/models/requests/by-endpoint", include_in_schema=False)
async def by_endpoint(request: Request) -> Response:
    """Return a page of this key's finished requests, newest first. `expand=payloads` adds their inputs and outputs."""
    owner = authenticate(request)
    query = _read(request, RequestsQuery)
    start = query.start or datetime.now(UTC) - (SINGLE_REQUEST_WINDOW if query.request_id else DEFAULT_WINDOW)
    history_query = HistoryQuery(
        owner=owner,
        limit=query.limit,
        endpoints=query.endpoint_id,
        ended_from=_seconds(start),
        ended_before=_seconds(query.end) if query.end else None,
        status=query.status,
        request_id=query.request_id,
        cursor=query.cursor,
        include_payloads="payloads" in query.expand,
    )
    services = get_services(request)

    def read() -> FalJSONResponse:
        return FalJSONResponse(services.history(history_query))

    num_bytes = query.limit * _ITEM_BYTES if history_query.include_payloads else 0
    try:
        return await read_when_room(services, owner, num_bytes, read)
    except ValueError as error:
        raise InvalidInput.of("value_error", ("query", "cursor"), str(error), query.cursor) from None


def _fits(model: Model, query: ModelsQuery) -> bool:
    text = f"{model.endpoint} {fal_openapi.summary(model)}".lower()
    return (
        all(word in text for word in query.q.lower().split())
        and query.category in (None, fal_openapi.category(model))
        and query.status != "deprecated"
    )


def _model(model: Model, base_url: str, *, has_openapi: bool) -> ListedModel:
    metadata: ModelMetadata = {
        "display_name": model.endpoint.partition("/")[2],
        "category": fal_openapi.category(model),
        "description": fal_openapi.summary(model),
        "status": "active",
        "tags": [],
        "updated_at": _SINCE,
        "date": _SINCE,
        "is_favorited": False,
        "thumbnail_url": "",
        "model_url": f"{base_url}/{model.endpoint}",
        "highlighted": False,
        "pinned": False,
    }
    listed = ListedModel(endpoint_id=model.endpoint, metadata=metadata)
    if has_openapi:
        listed["openapi"] = fal_openapi.queue_openapi(model, base_url)
    return listed


def _time_series(rows: Sequence[UsageRow]) -> list[UsageBucket]:
    return [
        {
            "bucket": f"{day.isoformat()}T00:00:00+00:00",
            "results": [_line(row.endpoint, [row]) for row in rows if row.day == day],
        }
        for day in sorted({row.day for row in rows})
    ]


def _line(endpoint: str, rows: Iterable[UsageRow]) -> UsageLine:
    quantity = sum(row.billable_units for row in rows)
    return {
        "endpoint_id": endpoint,
        "unit": UNIT,
        "quantity": quantity,
        "unit_price": 0.0,
        "cost": 0.0,
        "currency": CURRENCY,
        "auth_method": "key",
    }


def _paging(next_cursor: str | None = None) -> Page:
    return {"next_cursor": next_cursor, "has_more": next_cursor is not None}


def _read(request: Request, kind: type[Q]) -> Q:
    """Parse the query parameters. Raises InvalidInput in fal's shape."""
    parameters: dict[str, Any] = dict(request.query_params)
    # Clients may send these parameters more than once.
    parameters |= {name: request.query_params.getlist(name) for name in ("endpoint_id", "expand") if name in parameters}
    try:
        return kind.model_validate(parameters)
    except ValidationError as error:
        entries = validation.validation_detail(error.errors(include_url=False), b"")
        raise InvalidInput([{**entry, "loc": ["query", *entry["loc"][1:]]} for entry in entries]) from None


def _seconds(time: datetime) -> float:
    """Convert to seconds since 1970."""
    return _utc(time).timestamp()


def _utc(time: datetime) -> datetime:
    """Convert to UTC. A time without a zone counts as UTC."""
    return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
