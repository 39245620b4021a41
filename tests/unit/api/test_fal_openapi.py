"""Tests of the conversion to OpenAPI 3.0, which has fewer keywords than the schemas of models."""

from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from server.api.fal_openapi import _in_openapi_3_0


class Inner(BaseModel):
    """A schema that others refer to."""

    x: int


class Fields(BaseModel):
    """Fields that OpenAPI 3.0 describes in another way."""

    optional: int | None = None
    nullable: int | None
    nullable_union: int | str | None
    above: Annotated[float, Field(gt=0)]
    example: Annotated[str, Field(examples=["a", "b"])]
    inner: Inner | None = None
    described: Inner | None = Field(None, description="Next to a reference.")


@pytest.mark.parametrize(
    ("field", "schema"),
    [
        ("optional", {"type": "integer"}),
        ("nullable", {"type": "integer", "nullable": True}),
        ("nullable_union", {"anyOf": [{"type": "integer"}, {"type": "string"}], "nullable": True}),
        ("above", {"type": "number", "minimum": 0, "exclusiveMinimum": True}),
        ("example", {"type": "string", "example": "a"}),
        ("inner", {"$ref": "#/$defs/Inner"}),
        ("described", {"allOf": [{"$ref": "#/$defs/Inner"}], "description": "Next to a reference."}),
    ],
)
def test_a_field_in_openapi_3_0(field: str, schema: object) -> None:
    converted = _in_openapi_3_0(Fields.model_json_schema())["properties"][field]
    converted.pop("title", None)
    assert converted == schema
