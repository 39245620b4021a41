"""The server's OpenAPI document: FastAPI's document, plus the paths, Input and Output of every model."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from models.base import Model
from server.api.fal_openapi import QUEUE_STATUS

_REFERENCE = "#/components/schemas/{model}"


def document(app: FastAPI, models: Mapping[str, Model]) -> dict[str, Any]:
    """Build the OpenAPI 3.1 document of the whole server, with the models' own paths first."""
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    inputs = [(model.Input, "validation") for model in models.values()]
    outputs = [(model.Output, "serialization") for model in models.values()]
    _, definitions = models_json_schema([*inputs, *outputs], ref_template=_REFERENCE)  # type: ignore[list-item]
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {}).update(definitions["$defs"], **_QUEUE_SCHEMAS)
    components["securitySchemes"] = {
        "apiKeyAuth": {"type": "apiKey", "in": "header", "name": "Authorization", "description": "Key YOUR_KEY"}
    }
    schema["security"] = [{"apiKeyAuth": []}, {}]
    paths = {path: operations for model in models.values() for path, operations in _paths(model).items()}
    schema["paths"] = {**paths, **schema["paths"]}
    return schema


def _paths(model: Model) -> dict[str, Any]:
    output = {"$ref": _REFERENCE.format(model=model.Output.__name__)}
    queued = {"$ref": _REFERENCE.format(model="QueueStatus")}
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    return {
        f"/{model.endpoint}": {"post": _operation(model, "run", "Generate and wait for the output", _json(output))},
        f"/{model.endpoint}/stream": {"post": _operation(model, "stream", "Generate and stream the progress", events)},
        f"/queue/{model.endpoint}": {
            "post": _operation(model, "submit", "Submit a request to the queue", _json(queued))
        },
    }


def _operation(model: Model, name: str, summary: str, content: dict[str, Any]) -> dict[str, Any]:
    body = {"$ref": _REFERENCE.format(model=model.Input.__name__)}
    problem = {"$ref": _REFERENCE.format(model="Problem")}
    codes = ("401", "404", "413", "422", "429", "500", "507")
    return {
        "tags": [model.endpoint],
        "operationId": f"{name}_{model.endpoint.replace('/', '_').replace('-', '_')}",
        "summary": summary,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {
            "200": {"description": "Success", "content": content},
            **{code: {"description": "Error", "content": _json(problem)} for code in codes},
        },
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


_QUEUE_SCHEMAS: dict[str, Any] = {
    "QueueStatus": {
        **QUEUE_STATUS,
        "properties": {
            **QUEUE_STATUS["properties"],
            # fal's document says object, but its responses contain a list.
            "logs": {"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]},
            "error": {"type": "string"},
            "error_type": {"type": "string"},
        },
    },
    "Problem": {
        "type": "object",
        "required": ["detail"],
        "properties": {
            "detail": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
            "error_type": {"type": "string"},
        },
    },
}
