"""An OpenAPI document of one endpoint's queue, in fal's form, generated from the model."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from models.base import Model

_REFERENCE = "#/components/schemas/{model}"
#: The schema of a request's status, copied from fal's own document.
QUEUE_STATUS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "status": {"type": "string", "enum": ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]},
        "request_id": {"type": "string", "description": "The request id."},
        "response_url": {"type": "string", "description": "The response url."},
        "status_url": {"type": "string", "description": "The status url."},
        "cancel_url": {"type": "string", "description": "The cancel url."},
        "logs": {"type": "object", "description": "The logs.", "additionalProperties": True},
        "metrics": {"type": "object", "description": "The metrics.", "additionalProperties": True},
        "queue_position": {"type": "integer", "description": "The queue position."},
    },
    "required": ["status", "request_id"],
}


def queue_openapi(model: Model, base_url: str) -> dict[str, Any]:
    """Build an OpenAPI 3.0.4 document in the form of fal's /api/openapi/queue/openapi.json?endpoint_id=..."""
    schemas = component_schemas(model)
    endpoint = model.endpoint
    request = f"/{endpoint}/requests/{{request_id}}"
    status = {"$ref": _REFERENCE.format(model="QueueStatus")}
    output = {"$ref": _REFERENCE.format(model=model.Output.__name__)}
    body = {"$ref": _REFERENCE.format(model=model.Input.__name__)}
    success = {"type": "object", "properties": {"status": {"type": "string"}}}
    submit = {"requestBody": {"required": True, "content": _json(body)}, **_answers("The request status.", status)}
    logs = {"name": "logs", "in": "query", "required": False, "schema": {"type": "number"}}
    request_id = {"name": "request_id", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.0.4",
        "info": {
            "title": f"Queue OpenAPI for {endpoint}",
            "version": "1.0.0",
            "description": f"The OpenAPI schema for the {endpoint} queue.",
            "x-fal-metadata": {
                "endpointId": endpoint,
                "category": category(model),
                "thumbnailUrl": "",
                "playgroundUrl": f"{base_url}/",
                "documentationUrl": f"{base_url}/models/{endpoint}/llms.txt",
            },
        },
        "components": {
            "securitySchemes": {
                "apiKeyAuth": {"type": "apiKey", "in": "header", "name": "Authorization", "description": "Fal Key"}
            },
            "schemas": {"QueueStatus": QUEUE_STATUS, **schemas},
        },
        "paths": {
            f"/{endpoint}": {"post": submit},
            f"{request}/status": {"get": {"parameters": [request_id, logs], **_answers("The request status.", status)}},
            f"{request}/cancel": {
                "put": {"parameters": [request_id], **_answers("The request was cancelled.", success)}
            },
            request: {"get": {"parameters": [request_id], **_answers("Result of the request.", output)}},
        },
        "servers": [{"url": f"{base_url}/queue"}],
        "security": [{"apiKeyAuth": []}],
    }


def category(model: Model) -> str:
    """Return fal's category of the model: "image-to-image" if it takes an image, otherwise "text-to-image"."""
    return "image-to-image" if "image_url" in model.Input.model_fields else "text-to-image"


def component_schemas(model: Model) -> dict[str, Any]:
    """Build OpenAPI 3.0 schemas of Input, Output and the types in them, with fal's x-fal-order-properties."""
    pairs = [(model.Input, "validation"), (model.Output, "serialization")]
    _, definitions = models_json_schema(pairs, ref_template=_REFERENCE)  # type: ignore[arg-type]
    schemas: dict[str, Any] = _in_openapi_3_0(definitions["$defs"])
    for schema in schemas.values():
        schema["x-fal-order-properties"] = list(schema.get("properties", {}))
    return schemas


def _in_openapi_3_0(value: Any) -> Any:
    """Convert a JSON schema to OpenAPI 3.0, which has no null type and marks exclusive minimums with a flag."""
    if isinstance(value, list):
        return [_in_openapi_3_0(item) for item in value]
    if not isinstance(value, dict):
        return value
    cleaned = {key: _in_openapi_3_0(item) for key, item in value.items() if not (key == "default" and item is None)}
    if "exclusiveMinimum" in cleaned:
        cleaned |= {"minimum": cleaned["exclusiveMinimum"], "exclusiveMinimum": True}
    options = [item for item in cleaned.get("anyOf", []) if item != {"type": "null"}]
    if "anyOf" in cleaned and len(options) == 1:
        return {**options[0], **{key: item for key, item in cleaned.items() if key != "anyOf"}}
    return {**cleaned, **({"anyOf": options} if options else {})}


def summary(model: Model) -> str:
    """Return the docstring of the model's class in one line, or the endpoint id if there is none."""
    return re.sub(r"\s+", " ", (type(model).__doc__ or model.endpoint).strip())


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _answers(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"responses": {"200": {"description": description, "content": _json(schema)}}}
