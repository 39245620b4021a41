"""The server's OpenAPI document: FastAPI's document, plus the paths, Input and Output of every model."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from models.base import Model
from server.api.component_schemas import References, build_schemas, reference, types_of
from server.api.fal_openapi import LICENSE, summary
from server.api.operations import content, error_responses, json_content
from server.api.parameters import PARAMETERS, references

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


def document(app: FastAPI, models: Mapping[str, Model], *, is_open: bool) -> dict[str, Any]:
    """Build the OpenAPI 3.1 document of the whole server, with the models' own paths first.

    The servers are missing, because they depend on the request. `is_open` tells whether callers need no key.
    """
    schema = get_openapi(
        title=app.title, version=app.version, description=app.description, license_info=LICENSE, routes=app.routes
    )
    schemas = schema["components"]["schemas"]
    _move_bodies(schema["paths"], schemas)
    types, added = build_schemas([each for model in models.values() for each in types_of(model)], taken=schemas)
    _add(schemas, added)
    schema["components"]["parameters"] = PARAMETERS
    schema["components"]["securitySchemes"] = {
        "apiKeyAuth": {"type": "apiKey", "in": "header", "name": "Authorization", "description": "Key YOUR_KEY"}
    }
    schema["security"] = [{"apiKeyAuth": []}, *([{}] if is_open else [])]
    schema["tags"] = _tags(schema["paths"], models)
    schema["paths"][_RESULT]["get"]["responses"]["200"]["content"] = json_content(_any_output(models, types))
    paths = {path: operations for model in models.values() for path, operations in _paths(model, types).items()}
    schema["paths"] = {**paths, **schema["paths"]}
    return schema


def _move_bodies(paths: Mapping[str, Any], schemas: dict[str, Any]) -> None:
    """Move the schemas of request bodies to the components, where generators find a name for each."""
    for operation in (operation for operations in paths.values() for operation in operations.values()):
        for media in operation.get("requestBody", {}).get("content", {}).values():
            if title := media["schema"].get("title"):
                definitions = media["schema"].pop("$defs", {})
                _add(schemas, {**definitions, title: media["schema"]})
                media["schema"] = reference(title)


def _add(schemas: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add schemas. Raises ValueError if a name would stand for two schemas that differ."""
    if differing := [name for name, schema in more.items() if schemas.setdefault(name, schema) != schema]:
        raise ValueError(f"two schemas have the same name: {', '.join(differing)}; rename one of the classes")


def _tags(paths: Mapping[str, Any], models: Mapping[str, Model]) -> list[dict[str, str]]:
    used = {tag for operations in paths.values() for operation in operations.values() for tag in operation["tags"]}
    about = {**{endpoint: summary(model) for endpoint, model in models.items()}, **_TAGS}
    return [{"name": tag, "description": text} for tag, text in about.items() if tag in used or tag in models]


def _any_output(models: Mapping[str, Model], types: References) -> dict[str, Any]:
    """Describe the result of a request to any endpoint. Many endpoints have the same Output."""
    outputs = {str(output): output for output in (types[endpoint, "serialization"] for endpoint in models)}
    return next(iter(outputs.values())) if len(outputs) == 1 else {"anyOf": list(outputs.values())}


def _paths(model: Model, types: References) -> dict[str, Any]:
    """Describe the paths of the model's endpoint. `types` has the references to its Input and Output."""
    body = types[model.endpoint, "validation"]
    output, queued = json_content(types[model.endpoint, "serialization"]), json_content(reference("QueueStatus"))
    events = content("text/event-stream")["content"]
    about_events = "Events with JSON objects: the steps, some with previews, and at the end the output."
    about_status = "The status of the request."
    run = _operation(model, "run", "Generate and wait for the output", body, "The output.", output)
    stream = _operation(model, "stream", "Generate and stream the progress", body, about_events, events)
    submit = _operation(model, "submit", "Submit a request to the queue", body, about_status, queued)
    return {
        f"/{model.endpoint}": {"post": run},
        f"/{model.endpoint}/stream": {"post": stream},
        f"/queue/{model.endpoint}": {"post": submit},
    }


def _operation(
    model: Model, name: str, title: str, body: dict[str, Any], description: str, answer: dict[str, Any]
) -> dict[str, Any]:
    parameters = [key for key in PARAMETERS if name == "submit" or not key.startswith("queue_")]
    return {
        "tags": [model.endpoint],
        "operationId": f"{name}_{model.endpoint.replace('/', '_').replace('-', '_')}",
        "summary": title,
        "parameters": references(*parameters),
        "requestBody": {"required": True, "content": json_content(body)},
        "responses": {
            "200": {"description": description, "content": answer},
            **error_responses(reference("Problem")),
        },
    }
