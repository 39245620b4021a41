"""fal's platform API for what a key has asked for: /v1/models/requests/by-endpoint."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from server import wire
from server.errors import InvalidInput
from server.history import Wanted
from server.routes import owner_of, parts_of
from server.wire import JSON

router = APIRouter(prefix="/v1/models/requests", tags=["history"])

#: Without a start, fal looks so far back; further for one request.
LATELY, FOR_ONE = timedelta(days=1), timedelta(days=90)


def _separated(value: object) -> object:
    return [part for each in value for part in str(each).split(",") if part] if isinstance(value, list) else value


class Query(BaseModel):
    """fal's parameters; without an endpoint_id, which fal insists on, all of them are meant."""

    endpoint_id: Annotated[list[str], BeforeValidator(_separated)] = Field([], max_length=50)
    limit: int = Field(50, ge=1, le=100)
    cursor: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    status: Literal["success", "error", "user_error"] | None = None
    request_id: str | None = None
    expand: Annotated[list[Literal["payloads"]], BeforeValidator(_separated)] = []
    sort_by: Literal["ended_at"] = "ended_at"


@router.get("/by-endpoint")
async def by_endpoint(request: Request) -> Response:
    """This key's finished requests, the newest first, a page at a time; `expand=payloads` adds input and output."""
    owner = owner_of(request)
    query = _read(request)
    start = query.start or datetime.now(UTC) - (FOR_ONE if query.request_id else LATELY)
    wanted = Wanted(
        owner=owner,
        limit=query.limit,
        endpoints=query.endpoint_id,
        ended_from=_seconds(start),
        ended_before=_seconds(query.end) if query.end else None,
        status=query.status,
        request_id=query.request_id,
        cursor=query.cursor,
        has_payloads="payloads" in query.expand,
    )
    try:
        return JSON(await asyncio.to_thread(parts_of(request).history, wanted))
    except ValueError as error:
        entry = {"type": "value_error", "loc": ["query", "cursor"], "msg": str(error), "input": query.cursor}
        raise InvalidInput([entry]) from None


def _read(request: Request) -> Query:
    """Raises InvalidInput, in fal's shape."""
    given: dict[str, Any] = dict(request.query_params)
    for name in ("endpoint_id", "expand"):
        given[name] = request.query_params.getlist(name)
    try:
        return Query.model_validate(given)
    except ValidationError as error:
        entries = wire.detail(error.errors(include_url=False), b"")
        raise InvalidInput([{**entry, "loc": ["query", *entry["loc"][1:]]} for entry in entries]) from None


def _seconds(time: datetime) -> float:
    """Since 1970; a time without a zone is in UTC."""
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
