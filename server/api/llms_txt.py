"""The llms.txt of an endpoint: Markdown for language models, in fal's form, generated from the model."""

import json
from collections.abc import Mapping
from typing import Any

from models.base import Model
from server.api.fal_openapi import category, input_and_output, summary


def render_llms_txt(model: Model, base_url: str) -> str:
    """Render Markdown in the form of fal's /models/<id>/llms.txt."""
    inputs, outputs = input_and_output(model)
    needed = {name: inputs["properties"][name].get("example", "a red apple") for name in inputs["required"]}
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
            "Self-hosted: images are free of charge.\n",
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
    if options := field.get("anyOf", field.get("allOf")):
        return " | ".join(_type(option) for option in options)
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
