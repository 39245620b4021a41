"""An OpenAPI document of one endpoint's queue, in fal's form, generated from the model."""

import re
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from models.base import Model
from server.api.component_schemas import KeyedType, References, build_schemas, referred_name, types_of
from server.api.operations import error_responses, json_content
from server.api.schemas.errors import Problem
from server.api.schemas.queue import Cancellation, QueueStatus

#: The license of the program whose API the documents describe.
LICENSE = {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}

_REQUEST_ID = {
    "name": "request_id",
    "in": "path",
    "required": True,
    "description": "The request id that the submit returned.",
    "schema": {"type": "string"},
}
_LOGS = {
    "name": "logs",
    "in": "query",
    "required": False,
    "description": "With 1, the status contains the log.",
    # A number, as in fal's document.
    "schema": {"type": "number"},
}
_QUEUE_TYPES: list[KeyedType] = [
    (kind.__name__, "serialization", TypeAdapter(kind)) for kind in (QueueStatus, Cancellation, Problem)
]


def queue_openapi(model: Model, base_url: str) -> dict[str, Any]:
    """Build an OpenAPI 3.0.4 document in the form of fal's /api/openapi/queue/openapi.json?endpoint_id=..."""
    endpoint = model.endpoint
    types, schemas = build_schemas([*_QUEUE_TYPES, *types_of(model)])
    return {
        "openapi": "3.0.4",
        "info": {
            "title": f"Queue OpenAPI for {endpoint}",
            "version": "1.0.0",
            "description": f"The OpenAPI schema for the {endpoint} queue.",
            "license": LICENSE,
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
            "schemas": _in_fals_form(schemas),
        },
        "paths": _paths(model, types),
        "servers": [{"url": f"{base_url}/queue"}],
        "security": [{"apiKeyAuth": []}],
    }


def _paths(model: Model, types: References) -> dict[str, Any]:
    request, output = f"/{model.endpoint}/requests/{{request_id}}", types[model.endpoint, "serialization"]
    queued, cancellation, problem = (types[key, mode] for key, mode, _ in _QUEUE_TYPES)
    done, pending = ("200", "The request status."), ("202", "The status of a request that is not done yet.")
    cancelled = ("200", "The request was cancelled.")
    stopping = ("202", "The request is running, and stops after its next step.")
    operation = partial(_operation, problem)
    submit = operation("submit", "Submit a request to the queue", queued, done)
    status = operation("get_status", "Get the status of a request", queued, done, pending)
    cancel = operation("cancel", "Cancel a request", cancellation, cancelled, stopping)
    result = operation("get_result", "Get the result of a request", output, ("200", "Result of the request."))
    body = {"required": True, "content": json_content(types[model.endpoint, "validation"])}
    return {
        f"/{model.endpoint}": {"post": {**submit, "requestBody": body}},
        f"{request}/status": {"get": {**status, "parameters": [_REQUEST_ID, _LOGS]}},
        f"{request}/cancel": {"put": {**cancel, "parameters": [_REQUEST_ID]}},
        request: {"get": {**result, "parameters": [_REQUEST_ID]}},
    }


def _operation(
    problem: dict[str, Any], name: str, title: str, answer: dict[str, Any], *answers: tuple[str, str]
) -> dict[str, Any]:
    """Build an operation. The bodies of its responses have the schema `answer`, and those of its errors `problem`."""
    responses = {code: {"description": description, "content": json_content(answer)} for code, description in answers}
    return {"operationId": name, "summary": title, "responses": {**responses, **error_responses(problem)}}


def category(model: Model) -> str:
    """Return fal's category of the model: "image-to-image" if it takes an image, otherwise "text-to-image"."""
    return "image-to-image" if "image_url" in model.Input.model_fields else "text-to-image"


def input_and_output(model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build OpenAPI 3.0 schemas of Input and Output, with fal's x-fal-order-properties."""
    types, schemas = build_schemas(types_of(model))
    converted = _in_fals_form(schemas)
    body, output = types[model.endpoint, "validation"], types[model.endpoint, "serialization"]
    return converted[referred_name(body)], converted[referred_name(output)]


def _in_fals_form(schemas: dict[str, Any]) -> dict[str, Any]:
    converted: dict[str, Any] = _in_openapi_3_0(schemas)
    for schema in converted.values():
        schema["x-fal-order-properties"] = list(schema.get("properties", {}))
    return converted


def _in_openapi_3_0(value: Any) -> Any:
    """Convert a JSON schema to OpenAPI 3.0.

    This version has no null type, marks exclusive minimums with a flag, and has one `example` instead of a list. A
    field that may be null becomes nullable, except for a default of null: such a field is simply left out.
    """
    if isinstance(value, list):
        return [_in_openapi_3_0(item) for item in value]
    if not isinstance(value, dict):
        return value
    cleaned = {key: _in_openapi_3_0(item) for key, item in value.items() if not (key == "default" and item is None)}
    if "exclusiveMinimum" in cleaned:
        cleaned |= {"minimum": cleaned["exclusiveMinimum"], "exclusiveMinimum": True}
    if isinstance(cleaned.get("examples"), list):
        cleaned["example"] = cleaned.pop("examples")[0]
    options = [item for item in cleaned.get("anyOf", []) if item != {"type": "null"}]
    if len(options) < len(cleaned.get("anyOf", [])) and "default" not in value:
        cleaned["nullable"] = True
    if len(options) == 1:
        rest = {key: item for key, item in cleaned.items() if key != "anyOf"}
        # What is next to a reference has no meaning there.
        return {"allOf": options, **rest} if rest and "$ref" in options[0] else {**options[0], **rest}
    return {**cleaned, **({"anyOf": options} if options else {})}


def summary(model: Model) -> str:
    """Return the docstring of the model's class in one line, or the endpoint id if there is none."""
    return re.sub(r"\s+", " ", (type(model).__doc__ or model.endpoint).strip())
