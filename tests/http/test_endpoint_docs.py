"""Descriptions of an endpoint: fal's OpenAPI document of its queue, and llms.txt with examples that run."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import httpx
import pytest
from openapi_schema_validator import OAS30Validator
from openapi_spec_validator import OpenAPIV30SpecValidator

from models import discover
from models.loading.specs import assign_weights
from tests.support.node import JS
from tests.support.python_client import env_variables
from tests.support.server_process import ROOT, Server, wait_until_completed

FLUX = "fal-ai/flux/dev"
#: The fields in the order of the endpoint's page on fal.
INPUT = [
    "prompt",
    "image_size",
    "num_inference_steps",
    "seed",
    "guidance_scale",
    "sync_mode",
    "num_images",
    "enable_safety_checker",
    "output_format",
    "acceleration",
]
#: All endpoints of the package.
FAMILY = sorted(assign_weights(["demo"], discover()))
OUTPUT = ["images", "timings", "seed", "has_nsfw_concepts", "prompt"]
REQUEST = f"/{FLUX}/requests/{{request_id}}"


def document_of(client: httpx.Client, endpoint: str = FLUX) -> Any:
    """Fetch the OpenAPI document as fal's tools do."""
    answer = client.get("/api/openapi/queue/openapi.json", params={"endpoint_id": endpoint})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


@pytest.fixture
def document(client: httpx.Client) -> Any:
    return document_of(client)


def schema(document: Any, name: str) -> Any:
    """Return a schema whose references a validator can resolve."""
    return {"$ref": f"#/components/schemas/{name}", "components": document["components"]}


def problems(document: Any, name: str, value: Any) -> list[str]:
    """List the reasons why the value does not match the schema."""
    return [error.message for error in OAS30Validator(schema(document, name)).iter_errors(value)]


@pytest.mark.parametrize("endpoint", [*FAMILY, "test/null"])
def test_the_document_is_openapi_3_0_4(client: httpx.Client, endpoint: str) -> None:
    found = document_of(client, endpoint)
    assert found["openapi"] == "3.0.4"
    assert [error.message for error in OpenAPIV30SpecValidator(found).iter_errors()] == []
    # OpenAPI 3.0 does not have these keywords, but validators accept them.
    text = json.dumps(found)
    assert '"const"' not in text
    assert '{"type": "null"}' not in text
    assert '"examples"' not in text
    assert "$defs" not in text
    assert not re.search(r'"exclusiveM\w+": \d', text)


def test_the_head_is_fals(document: Any, server: Server) -> None:
    info = document["info"]
    assert (info["title"], info["version"]) == (f"Queue OpenAPI for {FLUX}", "1.0.0")
    assert info["description"]
    metadata = info["x-fal-metadata"]
    assert set(metadata) == {"endpointId", "category", "thumbnailUrl", "playgroundUrl", "documentationUrl"}
    assert (metadata["endpointId"], metadata["category"]) == (FLUX, "text-to-image")
    assert document["servers"] == [{"url": f"{server.url}/queue"}]
    assert document["security"] == [{"apiKeyAuth": []}]
    scheme = document["components"]["securitySchemes"]["apiKeyAuth"]
    assert (scheme["type"], scheme["in"], scheme["name"]) == ("apiKey", "header", "Authorization")


def test_the_paths_are_fals(document: Any) -> None:
    methods = {path: set(item) - {"parameters"} for path, item in document["paths"].items()}
    assert methods == {
        f"/{FLUX}": {"post"},
        f"{REQUEST}/status": {"get"},
        f"{REQUEST}/cancel": {"put"},
        REQUEST: {"get"},
    }
    parameters = document["paths"][f"{REQUEST}/status"]["get"]["parameters"]
    assert [(each["name"], each["schema"]) for each in parameters if each["in"] == "query"] == [
        ("logs", {"type": "number"})
    ]
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    assert {operation["operationId"] for operation in operations} == {"submit", "get_status", "cancel", "get_result"}
    for operation in operations:
        assert operation["summary"]
        assert {"200", "4XX", "5XX"} <= set(operation["responses"])
    for path, method in (f"{REQUEST}/status", "get"), (f"{REQUEST}/cancel", "put"):
        assert "202" in document["paths"][path][method]["responses"]


def test_the_schemas_are_fals(document: Any) -> None:
    schemas = document["components"]["schemas"]
    assert {"QueueStatus", "FluxDevInput", "FluxDevOutput", "ImageSize", "Image"} <= set(schemas)
    # fal's document requires only the first two, but every response has them all.
    always = ["status", "request_id", "response_url", "status_url", "cancel_url", "logs", "metrics"]
    assert schemas["QueueStatus"]["required"] == always
    logs = schemas["QueueStatus"]["properties"]["logs"]
    assert (logs["type"], logs["nullable"]) == ("array", True)
    assert schemas["QueueStatus"]["properties"]["status"]["enum"] == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    assert schemas["FluxDevInput"]["x-fal-order-properties"] == INPUT
    assert schemas["FluxDevOutput"]["x-fal-order-properties"] == OUTPUT
    assert schemas["FluxDevInput"]["required"] == ["prompt"]
    assert set(schemas["FluxDevOutput"]["required"]) == set(OUTPUT)
    for name in schemas:
        assert schemas[name]["title"] == name
        assert schemas[name]["x-fal-order-properties"] == list(schemas[name]["properties"])


def test_the_fields_describe_the_accepted_values(document: Any) -> None:
    fields = document["components"]["schemas"]["FluxDevInput"]["properties"]
    ranges = {name: (field["minimum"], field["maximum"]) for name, field in fields.items() if "maximum" in field}
    assert ranges.pop("seed")[0] == 0
    assert ranges == {"num_inference_steps": (1, 50), "guidance_scale": (1, 20), "num_images": (1, 4)}
    assert {name: field["default"] for name, field in fields.items() if "default" in field} == {
        "image_size": "landscape_4_3",
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "sync_mode": False,
        "num_images": 1,
        "enable_safety_checker": True,
        "output_format": "jpeg",
        "acceleration": "none",
    }
    assert fields["output_format"]["enum"] == ["jpeg", "png"]
    assert fields["acceleration"]["enum"] == ["none", "regular", "high"]
    size, presets = fields["image_size"]["anyOf"]
    assert size == {"$ref": "#/components/schemas/ImageSize"}
    assert presets["enum"][:2] == ["square_hd", "square"]
    assert fields["prompt"]["example"]
    assert all(field["description"] for field in fields.values())


def test_requests_and_answers_match_the_document(document: Any, client: httpx.Client) -> None:
    body = {"prompt": "x", "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}
    assert problems(document, "FluxDevInput", body) == []
    assert problems(document, "FluxDevInput", {**body, "num_images": 9})
    submitted = client.post(f"/queue/{FLUX}", json=body).json()
    assert problems(document, "QueueStatus", submitted) == []
    assert problems(document, "QueueStatus", wait_until_completed(client, submitted["status_url"])) == []
    output = client.post(f"/{FLUX}", json=body).json()
    assert problems(document, "FluxDevOutput", output) == []
    refused = client.post(f"/{FLUX}", json={**body, "num_images": 9}).json()
    assert problems(document, "Problem", refused) == []


@pytest.mark.parametrize("endpoint", ["fal-ai/unknown", "", "fal-ai/flux", "../fal-ai/flux/dev", f"{FLUX}/x"])
def test_unknown_endpoint(client: httpx.Client, endpoint: str) -> None:
    for path, parameters in ("/api/openapi/queue/openapi.json", {"endpoint_id": endpoint}), (f"/models/{endpoint}", {}):
        suffix = "" if parameters else "/llms.txt"
        answer = client.get(f"{path}{suffix}", params=parameters)
        assert answer.status_code == 404
        assert isinstance(answer.json()["detail"], str)
    assert client.get("/api/openapi/queue/openapi.json").status_code == 404


def test_descriptions_need_no_key(keyless_client: httpx.Client) -> None:
    assert document_of(keyless_client, "test/null")["info"]["title"] == "Queue OpenAPI for test/null"
    assert keyless_client.get("/models/test/null/llms.txt").status_code == 200


@pytest.fixture
def text(client: httpx.Client) -> str:
    """Fetch llms.txt of the endpoint."""
    answer = client.get(f"/models/{FLUX}/llms.txt")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/")
    return answer.text


def examples(text: str, language: str) -> list[str]:
    """Return the code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)\n```", text, re.DOTALL)


def test_llms_txt_has_fals_sections(text: str) -> None:
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    assert lines[2].startswith("> ")
    assert [line for line in lines if line.startswith("## ")] == [
        "## Overview",
        "## Pricing",
        "## API Information",
        "## Usage Examples",
        "## Additional Resources",
    ]
    headings = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
    assert headings == ["Input Schema", "Output Schema", "cURL", "Python", "JavaScript"]
    for label in ("Endpoint", "Model ID", "Category", "Kind"):
        assert f"- **{label}**: " in text
    for label in ("Required Parameters Example", "Full Example", "Example Response"):
        assert f"**{label}**:" in text


def test_llms_txt_lists_every_field(text: str, server: Server) -> None:
    for name in {*INPUT, *OUTPUT}:
        assert f"- **`{name}`** (" in text
    for bound in ("Range: `1` to `50`", 'Default: `"landscape_4_3"`', 'Options: `"none"`, `"regular"`, `"high"`'):
        assert bound in text
    assert f"{server.url}/api/openapi/queue/openapi.json?endpoint_id={FLUX}" in text


def test_the_bodies_of_llms_txt_are_accepted(text: str, client: httpx.Client) -> None:
    required, full, *_ = (json.loads(example) for example in examples(text, "json"))
    assert set(required) == {"prompt"}
    assert set(full) == set(INPUT) - {"seed", "sync_mode"}
    for body in (required, full):
        assert client.post("/test/null", json=body).status_code == 200


@pytest.mark.parametrize("endpoint", FAMILY)
def test_every_endpoint_accepts_its_example(client: httpx.Client, endpoint: str) -> None:
    text = client.get(f"/models/{endpoint}/llms.txt").text
    required, full, *_ = (json.loads(example) for example in examples(text, "json"))
    category = "image-to-image" if "image_url" in required else "text-to-image"
    assert f"- **Category**: {category}" in text
    assert document_of(client, endpoint)["info"]["x-fal-metadata"]["category"] == category
    assert set(required) <= set(full)
    for body in (required, full):
        answer = client.post(f"/queue/{endpoint}", json=body)
        assert answer.status_code == 200, answer.text
        # Its image is of no interest here; tests/clients/test_every_endpoint.py generates one with each endpoint.
        client.put(httpx.URL(answer.json()["cancel_url"]).path).raise_for_status()


def test_the_python_example_runs(text: str, server: Server) -> None:
    (program,) = examples(text, "python")
    environment = {"PATH": os.environ["PATH"], **env_variables(server)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f"https://{server.tls_host}/files/" in done.stdout


def test_the_javascript_example_runs(node: None, text: str, server: Server) -> None:
    (program,) = examples(text, "javascript")
    environment = {"PATH": os.environ["PATH"], "FAL_KEY": "local"}
    command = ["node", "--input-type=module"]
    done = subprocess.run(command, cwd=JS, env=environment, input=program, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f"{server.url}/files/" in done.stdout


def test_the_curl_example_runs(text: str, server: Server) -> None:
    (command,) = examples(text, "bash")
    environment = {"PATH": os.environ["PATH"], "FAL_KEY": "local"}
    done = subprocess.run(
        ["sh", "-ec", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=True
    )
    assert json.loads(done.stdout)["images"][0]["url"].startswith(f"{server.url}/files/")


def test_the_playground_changes_results_with_image_to_image_and_not_with_inpainting(client: httpx.Client) -> None:
    endpoints = client.get("/playground.json").json()["image_to_image"]
    assert {"fal-ai/flux/dev/image-to-image", "fal-ai/flux-krea-lora/image-to-image"} <= set(endpoints)
    assert not any(endpoint.endswith("/inpainting") for endpoint in endpoints)


def test_the_playground_knows_every_image_input(client: httpx.Client) -> None:
    inputs = client.get("/playground.json").json()["image_inputs"]
    assert inputs["fal-ai/flux/dev/image-to-image"] == ["image_url"]
    assert {"control_loras.control_image_url", "image_url", "mask_url"} <= set(inputs["fal-ai/flux-general/inpainting"])
    assert "fal-ai/flux/dev" not in inputs
