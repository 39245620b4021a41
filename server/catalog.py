"""How fal's site describes an endpoint: an OpenAPI document of its queue, and llms.txt. Both made from the model."""

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from models.base import Model

_REFERENCE = "#/components/schemas/{model}"
_QUEUE_STATUS = {
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
    """OpenAPI 3.0.4 in the form of fal's /api/openapi/queue/openapi.json?endpoint_id=..."""
    schemas = _schemas(model)
    endpoint = model.endpoint
    request = f"/{endpoint}/requests/{{request_id}}"
    status = {"$ref": _REFERENCE.format(model="QueueStatus")}
    output = {"$ref": _REFERENCE.format(model=model.Output.__name__)}
    given = {"$ref": _REFERENCE.format(model=model.Input.__name__)}
    success = {"type": "object", "properties": {"status": {"type": "string"}}}
    submit = {"requestBody": {"required": True, "content": _json(given)}, **_answers("The request status.", status)}
    logs = {"name": "logs", "in": "query", "required": False, "schema": {"type": "number"}}
    one = {"name": "request_id", "in": "path", "required": True, "schema": {"type": "string"}}
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
            "schemas": {"QueueStatus": _QUEUE_STATUS, **schemas},
        },
        "paths": {
            f"/{endpoint}": {"post": submit},
            f"{request}/status": {"get": {"parameters": [one, logs], **_answers("The request status.", status)}},
            f"{request}/cancel": {"put": {"parameters": [one], **_answers("The request was cancelled.", success)}},
            request: {"get": {"parameters": [one], **_answers("Result of the request.", output)}},
        },
        "servers": [{"url": f"{base_url}/queue"}],
        "security": [{"apiKeyAuth": []}],
    }


def llms_txt(model: Model, base_url: str) -> str:
    """Markdown in the form of fal's /models/<id>/llms.txt."""
    schemas = _schemas(model)
    inputs, outputs = schemas[model.Input.__name__], schemas[model.Output.__name__]
    needed = {name: inputs["properties"][name].get("examples", ["a red apple"])[0] for name in inputs["required"]}
    defaults = {name: field["default"] for name, field in inputs["properties"].items() if "default" in field}
    full = {**needed, **{name: value for name, value in defaults.items() if name != "sync_mode"}}
    return "\n".join(
        [
            f"# {model.endpoint}\n",
            f"> {summary(model)}\n",
            "## Overview\n",
            f"- **Endpoint**: `{base_url}/{model.endpoint}`",
            f"- **Model ID**: `{model.endpoint}`",
            f"- **Category**: {category(model)}",
            "- **Kind**: inference\n",
            "## Pricing\n",
            "Self-hosted: no charge for a picture.\n",
            "## API Information\n",
            "### Input Schema\n",
            *_bullets(inputs),
            "\n**Required Parameters Example**:\n",
            _fenced("json", json.dumps(needed, indent=2)),
            "\n**Full Example**:\n",
            _fenced("json", json.dumps(full, indent=2)),
            "\n### Output Schema\n",
            *_bullets(outputs),
            "\n**Example Response**:\n",
            _fenced("json", json.dumps(_example_response(base_url, needed), indent=2)),
            "\n## Usage Examples\n",
            "### cURL\n",
            _fenced("bash", _curl(model, base_url, needed)),
            "\n### Python\n",
            _fenced("python", _python(model, needed)),
            "\n### JavaScript\n",
            _fenced("javascript", _javascript(model, base_url, needed)),
            "\n## Additional Resources\n",
            f"- [OpenAPI Schema]({base_url}/api/openapi/queue/openapi.json?endpoint_id={model.endpoint})",
            "",
        ]
    )


def category(model: Model) -> str:
    """fal's word for what goes in and what comes out."""
    return "image-to-image" if "image_url" in model.Input.model_fields else "text-to-image"


def _schemas(model: Model) -> dict[str, Any]:
    """Input, Output and what they refer to, with fal's x-fal-order-properties, in OpenAPI 3.0's words."""
    pairs = [(model.Input, "validation"), (model.Output, "serialization")]
    _, found = models_json_schema(pairs, ref_template=_REFERENCE)  # type: ignore[arg-type]
    schemas: dict[str, Any] = _in_openapi_3_0(found["$defs"])
    for schema in schemas.values():
        schema["x-fal-order-properties"] = list(schema.get("properties", {}))
    return schemas


def _in_openapi_3_0(value: Any) -> Any:
    """OpenAPI 3.0 has no null type and a flag for exclusive bounds."""
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


def _bullets(schema: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, field in schema["properties"].items():
        need = "required" if name in schema.get("required", ()) else "optional"
        lines.append(f"- **`{name}`** (`{_type(field)}`, _{need}_):\n  {field.get('description', '')}".rstrip())
        if "default" in field:
            lines.append(f"  - Default: `{json.dumps(field['default'])}`")
        if "minimum" in field and "maximum" in field:
            lines.append(f"  - Range: `{field['minimum']}` to `{field['maximum']}`")
        if choices := _choices(field):
            lines.append(f"  - Options: {', '.join(f'`{json.dumps(choice)}`' for choice in choices)}")
    return lines


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " | ".join(_type(option) for option in field["anyOf"])
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[-1]
    if "enum" in field:
        return "Enum"
    if field.get("type") == "array":
        return f"list<{_type(field['items'])}>"
    return str(field.get("type", "object"))


def _choices(field: Mapping[str, Any]) -> list[Any]:
    options = field.get("anyOf", [field])
    return [choice for option in options for choice in option.get("enum", [])]


def _example_response(base_url: str, needed: Mapping[str, Any]) -> dict[str, Any]:
    url = f"{base_url}/files/0123456789abcdef0123456789abcdef.jpg"
    return {
        "images": [{"url": url, "width": 1024, "height": 768, "content_type": "image/jpeg"}],
        "timings": {"inference": 1.2},
        "seed": 42,
        "has_nsfw_concepts": [False],
        "prompt": needed.get("prompt", ""),
    }


def summary(model: Model) -> str:
    """What the endpoint does, in a line."""
    return re.sub(r"\s+", " ", (type(model).__doc__ or model.endpoint).strip())


def _curl(model: Model, base_url: str, needed: Mapping[str, Any]) -> str:
    body = json.dumps(needed)
    return (
        f"curl --request POST \\\n  --url {base_url}/{model.endpoint} \\\n"
        f'  --header "Authorization: Key $FAL_KEY" \\\n  --header "Content-Type: application/json" \\\n'
        f"  --data '{body}'"
    )


def _python(model: Model, needed: Mapping[str, Any]) -> str:
    arguments = json.dumps(needed)
    return (
        f'import fal_client\n\nresult = fal_client.subscribe("{model.endpoint}", arguments={arguments})\nprint(result)'
    )


def _javascript(model: Model, base_url: str, needed: Mapping[str, Any]) -> str:
    proxy = f'fal.config({{ proxyUrl: {{ url: "{base_url}/api/fal/proxy", when: "always" }} }});'
    call = f'const result = await fal.subscribe("{model.endpoint}", {{ input: {json.dumps(needed)} }});'
    return f'import {{ fal }} from "@fal-ai/client";\n\n{proxy}\n{call}\nconsole.log(result.data);'


def _fenced(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _answers(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"responses": {"200": {"description": description, "content": _json(schema)}}}
