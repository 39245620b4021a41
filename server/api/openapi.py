"""The server's OpenAPI document: FastAPI's document, plus the paths, Input and Output of every model."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from models.base import Model
from server.api.fal_openapi import LICENSE, summary
from server.api.operations import ERRORS, REFERENCE, content, parameter

_RESULT = "/queue/{app}/requests/{request_id}"
#: The tags of routes, each with its description.
_TAGS = {
    "queue": "The requests in fal's queue: their status, result and end.",
    "storage": "Uploads, in every form that fal's SDKs use.",
    "files": "Generated images and uploaded files.",
    "openai": "OpenAI's images API.",
    "platform": "fal's platform API: models, prices, usage and finished requests.",
    "tokens": "Tokens for browsers, and the keys that verify webhooks.",
    "catalog": "Descriptions of the endpoints.",
    "operations": "The state of the server.",
    "AUTOMATIC1111": "The part of AUTOMATIC1111's API that chat programs call.",
}
#: Parameters of requests to endpoints. Those that are for the queue alone have names that start with `queue_`.
_PARAMETERS: dict[str, dict[str, Any]] = {
    "queue_webhook": parameter(
        "query",
        "fal_webhook",
        {"type": "string", "format": "uri", "description": "The URL that the server calls with the result."},
    ),
    "queue_idempotency_key": parameter(
        "header",
        "Idempotency-Key",
        {
            "type": "string",
            "minLength": 1,
            "maxLength": 255,
            "description": "A second request with the same key does not run again; the response is that of the first.",
        },
    ),
    "max_queue_length": parameter(
        "query",
        "fal_max_queue_length",
        {"type": "integer", "minimum": 1, "description": "Refuse the request if more than this many are waiting."},
    ),
    "priority": parameter(
        "header",
        "X-Fal-Queue-Priority",
        {
            "type": "string",
            "enum": ["normal", "low"],
            "description": "Requests of low priority run after those of normal priority.",
        },
    ),
    "start_timeout": parameter(
        "header",
        "X-Fal-Request-Timeout",
        {
            "type": "number",
            "exclusiveMinimum": 0.1,
            "description": "The seconds in which the request must start, or else it fails with 504.",
        },
    ),
    "store_io": parameter(
        "header",
        "X-Fal-Store-IO",
        {"type": "string", "enum": ["0", "1"], "description": "With 0, the request is in no list of requests."},
    ),
    "lifecycle": parameter(
        "header",
        "X-Fal-Object-Lifecycle-Preference",
        {
            "type": "string",
            "description": "How long the images are kept and who may read them, as JSON.",
            "examples": ['{"expiration_duration_seconds": 3600}'],
        },
    ),
}


def document(app: FastAPI, models: Mapping[str, Model], *, is_open: bool) -> dict[str, Any]:
    """Build the OpenAPI 3.1 document of the whole server, with the models' own paths first.

    The servers are missing, because they depend on the request. `is_open` tells whether callers need no key.
    """
    schema = get_openapi(
        title=app.title, version=app.version, description=app.description, license_info=LICENSE, routes=app.routes
    )
    schemas = schema["components"]["schemas"]
    _move_bodies(schema["paths"], schemas)
    inputs = [(model.Input, "validation") for model in models.values()]
    outputs = [(model.Output, "serialization") for model in models.values()]
    _, definitions = models_json_schema([*inputs, *outputs], ref_template=REFERENCE)  # type: ignore[list-item]
    schemas.update(definitions["$defs"])
    schema["components"]["parameters"] = _PARAMETERS
    schema["components"]["securitySchemes"] = {
        "apiKeyAuth": {"type": "apiKey", "in": "header", "name": "Authorization", "description": "Key YOUR_KEY"}
    }
    schema["security"] = [{"apiKeyAuth": []}, *([{}] if is_open else [])]
    schema["tags"] = _tags(schema["paths"], models)
    schema["paths"][_RESULT]["get"]["responses"]["200"]["content"] = _json(_any_output(models))
    paths = {path: operations for model in models.values() for path, operations in _paths(model).items()}
    schema["paths"] = {**paths, **schema["paths"]}
    return schema


def _move_bodies(paths: Mapping[str, Any], schemas: dict[str, Any]) -> None:
    """Move the schemas of request bodies to the components, where generators find a name for each."""
    for operation in (operation for operations in paths.values() for operation in operations.values()):
        for media in operation.get("requestBody", {}).get("content", {}).values():
            if title := media["schema"].get("title"):
                definitions = media["schema"].pop("$defs", {})
                schemas.update(definitions, **{title: media["schema"]})
                media["schema"] = _reference(title)


def _tags(paths: Mapping[str, Any], models: Mapping[str, Model]) -> list[dict[str, str]]:
    used = {tag for operations in paths.values() for operation in operations.values() for tag in operation["tags"]}
    about = {**{endpoint: summary(model) for endpoint, model in models.items()}, **_TAGS}
    return [{"name": tag, "description": text} for tag, text in about.items() if tag in used or tag in models]


def _any_output(models: Mapping[str, Model]) -> dict[str, Any]:
    """Describe the result of a request to any endpoint. Many endpoints have the same Output."""
    references = [_reference(name) for name in dict.fromkeys(model.Output.__name__ for model in models.values())]
    return references[0] if len(references) == 1 else {"anyOf": references}


def _paths(model: Model) -> dict[str, Any]:
    output, queued = _json(_reference(model.Output.__name__)), _json(_reference("QueueStatus"))
    run = _operation(model, "run", "Generate and wait for the output", "The output.", output)
    stream = _operation(
        model,
        "stream",
        "Generate and stream the progress",
        "Events with JSON objects: the steps, some with previews, and at the end the output.",
        content("text/event-stream")["content"],
    )
    submit = _operation(model, "submit", "Submit a request to the queue", "The status of the request.", queued)
    return {
        f"/{model.endpoint}": {"post": run},
        f"/{model.endpoint}/stream": {"post": stream},
        f"/queue/{model.endpoint}": {"post": submit},
    }


def _operation(model: Model, name: str, title: str, description: str, body: dict[str, Any]) -> dict[str, Any]:
    parameters = [key for key in _PARAMETERS if name == "submit" or not key.startswith("queue_")]
    problem = _json(_reference("Problem"))
    return {
        "tags": [model.endpoint],
        "operationId": f"{name}_{model.endpoint.replace('/', '_').replace('-', '_')}",
        "summary": title,
        "parameters": [{"$ref": f"#/components/parameters/{key}"} for key in parameters],
        "requestBody": {"required": True, "content": _json(_reference(model.Input.__name__))},
        "responses": {
            "200": {"description": description, "content": body},
            **{str(code): {"description": error["description"], "content": problem} for code, error in ERRORS.items()},
        },
    }


def _reference(name: str) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=name)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
