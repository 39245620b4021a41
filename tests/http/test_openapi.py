"""The OpenAPI document of the whole server, and Redocly's linter on all documents."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.support.node import JS
from tests.support.server_process import TEST_MODELS, Gate, Server, serving

FLUX = "fal-ai/flux/dev"


def document_of(client: httpx.Client, **headers: str) -> Any:
    """Fetch the document."""
    return client.get("/openapi.json", headers=headers).raise_for_status().json()


@pytest.fixture
def document(client: httpx.Client) -> Any:
    return document_of(client)


def operations(document: Any) -> Iterator[Any]:
    """Yield every operation."""
    for item in document["paths"].values():
        yield from item.values()


def test_the_document_is_openapi_3_1(document: Any) -> None:
    assert document["openapi"].startswith("3.1.")
    assert [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()] == []


def test_the_server_is_the_one_that_the_client_reached(client: httpx.Client, server: Server) -> None:
    port = client.base_url.port
    assert document_of(client)["servers"] == [{"url": server.url}]
    assert client.head("/openapi.json").status_code == 200
    assert document_of(client, host=f"localhost:{port}")["servers"] == [{"url": f"http://localhost:{port}"}]


def test_a_key_is_optional_only_if_the_server_needs_none(document: Any, keyless_client: httpx.Client) -> None:
    assert document["security"] == [{"apiKeyAuth": []}, {}]
    assert document_of(keyless_client)["security"] == [{"apiKeyAuth": []}]


def test_every_operation_is_described(document: Any) -> None:
    tags = {tag["name"] for tag in document["tags"]}
    for operation in operations(document):
        assert operation["summary"]
        assert set(operation["tags"]) <= tags
        for code in "4XX", "5XX":
            assert list(operation["responses"][code]["content"]) == ["application/json"]
    names = [operation["operationId"] for operation in operations(document)]
    assert {"queue_status", "queue_result", "openai_generations", "run_fal_ai_flux_dev"} <= set(names)
    assert len(set(names)) == len(names)


def test_bodies_and_responses_have_types(document: Any) -> None:
    for operation in operations(document):
        described = [operation.get("requestBody", {}), *operation["responses"].values()]
        for media in (media for each in described for media in each.get("content", {}).values()):
            assert media["schema"]


def test_what_is_not_json_has_its_type(document: Any) -> None:
    def types(path: str, method: str, code: str = "200") -> list[str]:
        return list(document["paths"][path][method]["responses"][code].get("content", {}))

    assert types(f"/{FLUX}/stream", "post") == ["text/event-stream"]
    assert types("/queue/{app}/requests/{request_id}/status/stream", "get") == ["text/event-stream"]
    assert types("/queue/{app}/requests/{request_id}", "delete", "204") == []
    assert types("/files/{name}", "get") == [
        "application/octet-stream",
        "image/jpeg",
        "image/png",
        "image/webp",
        "*/*",
    ]
    assert types("/metrics", "get") == ["text/plain"]
    assert types("/models/{endpoint}/llms.txt", "get") == ["text/markdown"]
    assert types("/v1/images/edits", "post") == ["application/json", "text/event-stream"]
    edit = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    form = document["components"]["schemas"][edit["$ref"].rpartition("/")[2]]
    assert form["required"] == ["image", "prompt"]
    assert form["properties"]["mask"]["format"] == "binary"


def test_a_pending_status_is_described(document: Any) -> None:
    responses = document["paths"]["/queue/{app}/requests/{request_id}/status"]["get"]["responses"]
    assert responses["202"]["content"] == responses["200"]["content"]
    logs = document["components"]["schemas"]["QueueStatus"]["properties"]["logs"]
    assert [option["type"] for option in logs["anyOf"]] == ["array", "null"]


def parameters_of(document: Any, path: str, method: str = "post") -> dict[str, Any]:
    """Return the parameters of an operation by their names."""
    found = document["paths"][path][method].get("parameters", [])
    components = document["components"]["parameters"]
    resolved = [components[each["$ref"].rpartition("/")[2]] if "$ref" in each else each for each in found]
    return {each["name"]: each for each in resolved}


def test_requests_have_the_parameters_that_the_server_reads(document: Any) -> None:
    headers = {
        "X-Fal-Queue-Priority",
        "X-Fal-Request-Start-Timeout",
        "X-Fal-Request-Timeout",
        "X-Fal-Runner-Hint",
        "X-Fal-Store-IO",
        "X-Fal-Object-Lifecycle-Preference",
    }
    run, submit = parameters_of(document, f"/{FLUX}"), parameters_of(document, f"/queue/{FLUX}")
    assert set(run) == {*headers, "fal_max_queue_length"}
    assert set(submit) == {*run, "fal_webhook", "Idempotency-Key"}
    assert "if this many requests, or more, are waiting" in run["fal_max_queue_length"]["description"]
    assert "it is deleted with its result soon after" in run["X-Fal-Store-IO"]["description"]


def test_the_limits_of_parameters_are_those_of_the_server(document: Any, client: httpx.Client) -> None:
    submit = parameters_of(document, f"/queue/{FLUX}")

    def statuses(accepted: dict[str, str], refused: dict[str, str], kind: str = "headers") -> list[int]:
        options: list[Any] = [{kind: accepted}, {kind: refused}]
        return [client.post("/queue/test/null", json={"prompt": "x"}, **each).status_code for each in options]

    for name in "Idempotency-Key", "X-Fal-Runner-Hint":
        longest = submit[name]["schema"]["maxLength"]
        assert statuses({name: "k" * longest}, {name: "k" * (longest + 1)}) == [200, 400]
    for name in "X-Fal-Request-Start-Timeout", "X-Fal-Request-Timeout":
        limit = submit[name]["schema"]["exclusiveMinimum"]
        assert statuses({name: str(limit + 60)}, {name: str(limit)}) == [200, 400]
    url = "https://example.com/"
    url += "w" * (submit["fal_webhook"]["schema"]["maxLength"] - len(url))
    refused = client.post("/queue/test/null", json={"prompt": "x"}, params={"fal_webhook": f"{url}w"})
    assert (refused.status_code, refused.json()["detail"][0]["type"]) == (422, "url_too_long")


@pytest.mark.parametrize(
    "path",
    ["/storage/upload/initiate", "/storage/upload/initiate-multipart", "/files/upload", "/files/upload/multipart"],
)
def test_what_begins_an_upload_has_a_lifecycle(document: Any, path: str) -> None:
    assert "X-Fal-Object-Lifecycle-Preference" in parameters_of(document, path)


def test_the_document_of_an_endpoint_needs_its_id(document: Any) -> None:
    (endpoint_id,) = parameters_of(document, "/api/openapi/queue/openapi.json", "get").values()
    assert (endpoint_id["name"], endpoint_id["in"], endpoint_id["required"]) == ("endpoint_id", "query", True)


def test_the_steps_of_the_status_page_are_described(document: Any) -> None:
    schemas = document["components"]["schemas"]
    steps = schemas["ServerStatus"]["properties"]["steps"]["items"]["$ref"].rpartition("/")[2]
    assert list(schemas[steps]["properties"]) == ["size", "acceleration", "count", "seconds"]


class Described:
    """A client that compares each response with what the document says about its operation."""

    def __init__(self, client: httpx.Client, document: Any) -> None:
        self._client = client
        self._document = document

    def send(self, method: str, template: str, url: str = "", **options: Any) -> Any:
        """Send a request to an operation, given its path in the document; return the body of the response."""
        response = self._client.request(method, url or template, **options)
        described = self._document["paths"][template][method.lower()]["responses"]
        content = described[str(response.status_code)].get("content", {})
        if not content:
            assert response.content == b""
            return None
        media_type = response.headers["content-type"].partition(";")[0]
        assert media_type in content
        if media_type != "application/json":
            return response.content
        schema = {**content[media_type]["schema"], "components": self._document["components"]}
        assert [error.message for error in OAS31Validator(schema).iter_errors(response.json())] == []
        return response.json()


@pytest.fixture
def described(client: httpx.Client, document: Any) -> Described:
    return Described(client, document)


def test_the_queues_responses_are_as_described(described: Described, client: httpx.Client, gate: Gate) -> None:
    waiting = described.send("POST", "/queue/test/gate", json={"prompt": str(gate.path)})
    status, request = "/queue/{app}/requests/{request_id}/status", "/queue/{app}/requests/{request_id}"
    described.send("GET", status, waiting["status_url"])
    described.send("GET", status, waiting["status_url"], params={"logs": 1})
    described.send("PUT", f"{request}/cancel", waiting["cancel_url"])
    gate.release_all()
    done = described.send("POST", "/queue/test/null", json={"prompt": "x"})
    assert b"COMPLETED" in described.send("GET", f"{status}/stream", f"{done['status_url']}/stream")
    assert described.send("GET", status, done["status_url"], params={"logs": 1})["logs"]
    output = described.send("GET", request, done["response_url"])
    assert described.send("GET", "/files/{name}", output["images"][0]["url"])
    assert described.send("GET", "/files/{name}", output["images"][0]["url"], headers={"range": "bytes=0-9"})
    listed = described.send("GET", "/platform/v1/models/requests/by-endpoint", params={"expand": "payloads"})
    assert done["request_id"] in [item["request_id"] for item in listed["items"]]
    assert described.send("GET", "/platform/v1/models/usage", params={"expand": ["summary", "time_series"]})["summary"]
    described.send("DELETE", request, done["response_url"])


def test_the_responses_to_uploads_are_as_described(described: Described) -> None:
    token = described.send("POST", "/storage/auth/token", json={})["token"]
    headers = {"authorization": f"Bearer {token}", "x-fal-file-name": "a.txt"}
    assert described.send("POST", "/files/upload", content=b"x", headers=headers)["access_url"].endswith(".txt")
    begun = described.send("POST", "/storage/upload/initiate", json={"file_name": "a.png"})
    described.send("PUT", "/storage/upload/{upload_id}", begun["upload_url"], content=b"x")
    multipart = described.send("POST", "/files/upload/multipart", headers=headers)
    url = f"{multipart['access_url']}/multipart/{multipart['uploadId']}"
    part = described.send("PUT", "/files/{name}/multipart/{upload_id}/{part_number}", f"{url}/1", content=b"x")
    described.send("POST", "/files/{name}/multipart/{upload_id}/complete", f"{url}/complete", json={"parts": [part]})


def test_the_other_responses_are_as_described(described: Described) -> None:
    small = {"prompt": "x", "model": "test/null"}
    assert described.send("POST", "/v1/images/generations", json=small)["data"]
    assert b"image_generation.completed" in described.send(
        "POST", "/v1/images/generations", json={**small, "stream": True}
    )
    assert described.send("GET", "/v1/models")["data"]
    assert described.send("GET", "/v1/models/{name}", "/v1/models/test/null")
    assert b'"images"' in described.send("POST", "/test/null/stream", json={"prompt": "x"})
    assert described.send("POST", "/tokens", json={"allowed_apps": ["flux"]})
    assert described.send("GET", "/.well-known/jwks.json")["keys"]
    assert described.send("GET", "/health/ready")["status"] == "ready"
    assert described.send("GET", "/status.json")["is_ready"]
    assert described.send("GET", "/metrics")
    assert described.send("GET", "/platform/v1/models", params={"expand": "openapi-3.0"})["models"]
    assert described.send("GET", "/models/{endpoint}/llms.txt", f"/models/{FLUX}/llms.txt")


def redocly(*paths: Path) -> subprocess.CompletedProcess[str]:
    """Lint documents with Redocly."""
    command = [JS / "node_modules" / ".bin" / "redocly", "lint", "--config", JS / "redocly.yaml", *paths]
    environment = {"PATH": os.environ["PATH"], "REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"}
    return subprocess.run([str(each) for each in command], env=environment, capture_output=True, text=True, timeout=100)


def test_redocly_finds_nothing(node: None, client: httpx.Client, document: Any, tmp_path: Path) -> None:
    whole = tmp_path / "openapi.json"
    whole.write_text(json.dumps(document))
    paths = [whole]
    for endpoint in client.get("/playground.json").json()["endpoints"]:
        answer = client.get("/api/openapi/queue/openapi.json", params={"endpoint_id": endpoint}).raise_for_status()
        paths.append(tmp_path / f"{endpoint.replace('/', '_')}.json")
        paths[-1].write_bytes(answer.content)
    done = redocly(*paths)
    assert done.returncode == 0, done.stdout + done.stderr


def test_redocly_finds_nothing_with_automatic1111(node: None, tmp_path: Path) -> None:
    with serving(tmp_path / "data", TEST_MODELS, a1111="true") as running, httpx.Client(trust_env=False) as client:
        answer = client.get(f"{running.url}/openapi.json").raise_for_status()
    assert "/sdapi/v1/txt2img" in answer.json()["paths"]
    whole = tmp_path / "openapi.json"
    whole.write_bytes(answer.content)
    done = redocly(whole)
    assert done.returncode == 0, done.stdout + done.stderr


def test_redocly_would_find_an_invalid_example(node: None, document: Any, tmp_path: Path) -> None:
    document["components"]["schemas"]["FluxDevInput"]["properties"]["prompt"]["examples"] = [1]
    whole = tmp_path / "openapi.json"
    whole.write_text(json.dumps(document))
    done = redocly(whole)
    assert done.returncode == 1
    assert "no-invalid-schema-examples" in done.stdout + done.stderr
