"""Parts of OpenAPI operations that FastAPI cannot derive from handlers, which read their requests themselves."""

from typing import Any

from pydantic import BaseModel

from server.api.component_schemas import REFERENCE
from server.api.schemas.errors import Problem

#: The extra of a route that needs no key.
PUBLIC: dict[str, Any] = {"security": []}
#: The errors of every operation, unless its router has its own.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": Problem,
        "description": "The request was refused: 400 for a wrong header or parameter, 401 without a valid key, "
        "404 for something unknown, 413 for a body that is too large, 422 for invalid fields, "
        "429 when a limit is reached.",
    },
    "5XX": {
        "model": Problem,
        "description": "The server failed: 500 for an internal error, 503 while it is not ready, "
        "504 for a request that did not start before its deadline, 507 for a full disk.",
    },
}
_BINARY = {"type": "string", "format": "binary"}


def error_responses(problem: dict[str, Any]) -> dict[str, Any]:
    """Describe the responses of ERRORS; `problem` is the schema of their bodies."""
    return {
        str(code): {"description": error["description"], "content": json_content(problem)}
        for code, error in ERRORS.items()
    }


def json_content(schema: dict[str, Any]) -> dict[str, Any]:
    """Describe the content of a body that is JSON."""
    return {"application/json": {"schema": schema}}


def json_body(kind: type[BaseModel], *, is_required: bool = True) -> dict[str, Any]:
    """Describe a JSON body. `openapi.document` moves its schema to the components."""
    return _body("application/json", kind.model_json_schema(ref_template=REFERENCE), is_required=is_required)


def form_body(kind: type[BaseModel], required: str, *optional: str) -> dict[str, Any]:
    """Describe a multipart form: the fields of `kind`, a required file and optional files."""
    schema = kind.model_json_schema()
    fields = {name: without_null(field) for name, field in schema["properties"].items()}
    files = {name: {**_BINARY, "description": f"The {name} as a file."} for name in (required, *optional)}
    # Without additionalProperties, which generators cannot send in a form.
    form = {
        "type": "object",
        "title": f"{schema['title']}Form",
        "properties": {**files, **fields},
        "required": [required, *schema.get("required", [])],
    }
    return _body("multipart/form-data", form)


def file_body() -> dict[str, Any]:
    """Describe a body that is a file."""
    return _body("application/octet-stream", _BINARY)


def _body(media_type: str, schema: dict[str, Any], *, is_required: bool = True) -> dict[str, Any]:
    return {"requestBody": {"required": is_required, "content": {media_type: {"schema": schema}}}}


def query_parameters(kind: type[BaseModel]) -> dict[str, Any]:
    """Describe the query parameters that are the fields of `kind`."""
    schema = kind.model_json_schema()
    required = schema.get("required", ())
    fields = {name: without_null(field) for name, field in schema["properties"].items()}
    return {"parameters": [parameter("query", name, field, name in required) for name, field in fields.items()]}


def parameter(place: str, name: str, schema: dict[str, Any], is_required: bool = False) -> dict[str, Any]:
    """Describe one parameter. Its description is that of the schema."""
    inner = {key: value for key, value in schema.items() if key not in ("description", "title")}
    about = {"description": schema["description"]} if "description" in schema else {}
    return {"name": name, "in": place, "required": is_required, **about, "schema": inner}


def content(*media_types: str, is_binary: bool = False) -> dict[str, Any]:
    """Describe the content of a response that is text, or a file.

    Its route needs `response_class=Response`. With a class that has a media type, FastAPI would give it to errors too.
    """
    schema = _BINARY if is_binary else {"type": "string"}
    return {"content": {media_type: {"schema": schema} for media_type in media_types}}


def without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Remove null from a field, because parameters and forms have no null; also remove a default of null."""
    rest = {key: value for key, value in schema.items() if key != "anyOf" and (key != "default" or value is not None)}
    options = [option for option in schema.get("anyOf", []) if option != {"type": "null"}]
    return {**options[0], **rest} if len(options) == 1 else {**rest, **({"anyOf": options} if options else {})}
