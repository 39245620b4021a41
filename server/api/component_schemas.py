"""JSON schemas of types, for the components of OpenAPI documents. Types with the same name get different names."""

from collections.abc import Collection, Iterable
from typing import Any

from pydantic import TypeAdapter, create_model
from pydantic.json_schema import JsonSchemaMode

from models.base import Model

#: The form of references to schemas.
REFERENCE = "#/components/schemas/{model}"
#: A type with a key that finds its reference, and whether the schema describes what is read or what is written.
KeyedType = tuple[str, JsonSchemaMode, TypeAdapter[Any]]
References = dict[tuple[str, JsonSchemaMode], dict[str, Any]]


def types_of(model: Model) -> list[KeyedType]:
    """List the model's Input ("validation") and Output ("serialization"), both under the endpoint as key."""
    return [
        (model.endpoint, "validation", TypeAdapter(model.Input)),
        (model.endpoint, "serialization", TypeAdapter(model.Output)),
    ]


def build_schemas(types: Iterable[KeyedType], taken: Collection[str] = ()) -> tuple[References, dict[str, Any]]:
    """Build the schemas of the types and of all types in them, by name, and a reference to each of `types`.

    A name is that of the class, or, if another class or a schema in `taken` has the same name, a longer one.
    """
    # Pydantic gives names that differ to types that differ, so a placeholder keeps each taken name from the others.
    placeholders: list[KeyedType] = [
        (name, "validation", TypeAdapter(create_model(name, __doc__="The name is taken."))) for name in taken
    ]
    references, definitions = TypeAdapter.json_schemas([*placeholders, *types], ref_template=REFERENCE)
    found: References = {key: dict(reference) for key, reference in references.items()}
    schemas: dict[str, Any] = definitions["$defs"]
    for name, mode, _ in placeholders:
        del schemas[referred_name(found.pop((name, mode)))]
    for name, schema in schemas.items():
        # Generators name their classes after the titles.
        schema["title"] = name
    return found, schemas


def reference(name: str) -> dict[str, str]:
    """Return a reference to the schema `name`."""
    return {"$ref": REFERENCE.format(model=name)}


def referred_name(schema: dict[str, Any]) -> str:
    """Return the name of the schema that a reference refers to."""
    return str(schema["$ref"]).rpartition("/")[2]
