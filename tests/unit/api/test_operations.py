"""Tests of the descriptions of operations."""

from pydantic import BaseModel, Field

from server.api.operations import form_body, query_parameters, without_null


class Fields(BaseModel):
    """Fields of every kind."""

    name: str = Field(description="A name.")
    number: int | None = Field(None, ge=1)
    choices: list[str] = []


def test_query_parameters_have_the_limits_of_the_fields_and_no_null() -> None:
    name, number, choices = query_parameters(Fields)["parameters"]
    assert name == {
        "name": "name",
        "in": "query",
        "required": True,
        "description": "A name.",
        "schema": {"type": "string"},
    }
    assert (number["required"], number["schema"]) == (False, {"type": "integer", "minimum": 1})
    assert choices["schema"] == {"type": "array", "items": {"type": "string"}, "default": []}


def test_a_form_has_its_files_and_its_fields() -> None:
    body = form_body(Fields, "image", "mask")["requestBody"]
    form = body["content"]["multipart/form-data"]["schema"]
    assert (body["required"], form["title"]) == (True, "FieldsForm")
    assert form["required"] == ["image", "name"]
    assert list(form["properties"]) == ["image", "mask", "name", "number", "choices"]
    assert form["properties"]["mask"]["format"] == "binary"


def test_null_is_removed_and_other_options_stay() -> None:
    null = {"type": "null"}
    either = [{"type": "string"}, {"type": "integer"}]
    assert without_null({"anyOf": [either[0], null], "default": None}) == either[0]
    assert without_null({"anyOf": [*either, null], "title": "A"}) == {"anyOf": either, "title": "A"}
    assert without_null({"type": "string", "default": ""}) == {"type": "string", "default": ""}
