"""Tests of the names of schemas."""

from typing import Any

from pydantic import BaseModel, TypeAdapter, create_model

from server.api.component_schemas import build_schemas, referred_name


class Inner(BaseModel):
    """A schema that others refer to."""

    x: int


class Outer(BaseModel):
    """A schema that refers to another."""

    inner: Inner


def built(*kinds: type[BaseModel], taken: tuple[str, ...] = ()) -> tuple[list[str], dict[str, Any]]:
    """Return the names that the classes get, and all schemas."""
    types, schemas = build_schemas(
        [(str(index), "validation", TypeAdapter(kind)) for index, kind in enumerate(kinds)], taken
    )
    return [referred_name(reference) for reference in types.values()], schemas


def test_a_schema_has_the_name_of_its_class() -> None:
    names, schemas = built(Outer, taken=("Other",))
    assert names == ["Outer"]
    assert set(schemas) == {"Outer", "Inner"}
    assert schemas["Outer"]["properties"]["inner"] == {"$ref": "#/components/schemas/Inner"}


def test_two_classes_with_one_name_have_two_schemas() -> None:
    other = create_model("Inner", __module__="elsewhere", y=int)
    names, schemas = built(Outer, Inner, other)
    assert len(set(names)) == 3
    assert [list(schemas[name]["properties"]) for name in names] == [["inner"], ["x"], ["y"]]
    assert schemas["Outer"]["properties"]["inner"] == {"$ref": f"#/components/schemas/{names[1]}"}
    assert all(schema["title"] == name for name, schema in schemas.items())


def test_a_taken_name_is_given_to_no_class() -> None:
    names, schemas = built(Outer, taken=("Inner", "Outer"))
    assert {"Inner", "Outer"}.isdisjoint(schemas)
    assert list(schemas[names[0]]["properties"]) == ["inner"]
    assert len(schemas) == 2


def test_a_class_without_fields_does_not_get_a_taken_name() -> None:
    names, schemas = built(create_model("Empty"), taken=("Empty",))
    assert list(schemas) == names != ["Empty"]
