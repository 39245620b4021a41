"""Tests of the document of the whole server that need no server."""

from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, create_model

from models import discover
from server.api import openapi
from server.api.operations import ERRORS, json_body
from server.api.routes import queue


class Parcel(BaseModel):
    """A request body."""

    weight: int


def document_with(*bodies: type[BaseModel]) -> Any:
    """Build the document of an app with the queue's routes and one route for each request body."""
    app = FastAPI()
    app.include_router(queue.router, responses=ERRORS)

    async def receive() -> None:
        """Do nothing."""

    for number, body in enumerate(bodies):
        app.post(f"/parcels/{number}", tags=["parcels"], openapi_extra=json_body(body))(receive)
    return openapi.document(app, discover(), is_open=True)


def test_routes_can_share_a_body() -> None:
    document = document_with(Parcel, Parcel)
    bodies = [document["paths"][f"/parcels/{number}"]["post"]["requestBody"]["content"] for number in range(2)]
    assert bodies == [{"application/json": {"schema": {"$ref": "#/components/schemas/Parcel"}}}] * 2


@pytest.mark.parametrize("name", ["Parcel", "QueueStatus"])
def test_a_body_with_the_name_of_another_schema_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"two schemas have the same name: {name}; rename one of the classes"):
        document_with(Parcel, create_model(name, height=(int, ...)))
