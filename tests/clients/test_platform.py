"""Tests of fal's platform API: under the host api.fal.ai, through the proxy route, and with released programs."""

import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.test_run import run_under_flux_server
from tests.support.connect_clients import download_package
from tests.support.server_process import ROOT, TEST_MODELS, free_port, serving

API = {"host": "api.fal.ai"}
PROXY = "/api/fal/proxy"


def list_models(client: httpx.Client, **query: Any) -> dict[str, Any]:
    """List models as a client of api.fal.ai does; return the page of the answer."""
    answer = client.get("/v1/models", params=query, headers=API)
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()
    return page


def list_all(client: httpx.Client, **query: Any) -> list[str]:
    """Return the ids on all pages."""
    ids: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = list_models(client, **query, **cursor)
        ids += endpoint_ids(page)
        if not page["has_more"]:
            assert page["next_cursor"] is None
            return ids
        cursor = {"cursor": page["next_cursor"]}


def endpoint_ids(page: dict[str, Any]) -> list[str]:
    return [model["endpoint_id"] for model in page["models"]]


def test_every_served_endpoint_is_listed(client: httpx.Client) -> None:
    page = list_models(client, limit=100)
    assert set(endpoint_ids(page)) == set(client.get("/playground.json").json()["endpoints"])
    assert (page["next_cursor"], page["has_more"]) == (None, False)
    (dev,) = [model for model in page["models"] if model["endpoint_id"] == "fal-ai/flux/dev"]
    metadata = dev["metadata"]
    assert (metadata["display_name"], metadata["category"], metadata["status"]) == (
        "flux/dev",
        "text-to-image",
        "active",
    )
    assert "openapi" not in dev


def test_search_by_text_category_and_status(client: httpx.Client) -> None:
    schnell = ["fal-ai/flux-1/schnell", "fal-ai/flux/schnell"]
    assert list_all(client, q="flux schnell", category="text-to-image") == schnell
    assert list_all(client, q="no such thing") == []
    texts, images = (list_all(client, category=category) for category in ("text-to-image", "image-to-image"))
    assert sorted(texts + images) == list_all(client)
    assert "fal-ai/flux/dev/image-to-image" in images
    assert list_all(client, status="deprecated") == []


def test_pagination(client: httpx.Client) -> None:
    everything = endpoint_ids(list_models(client, limit=100))
    assert len(list_models(client, limit=3)["models"]) == 3
    assert list_all(client, limit=3) == everything
    # By default, a page has 50.
    assert list_all(client) == everything


def test_expand_adds_the_openapi_document(client: httpx.Client) -> None:
    (model,) = list_models(client, endpoint_id="fal-ai/flux/dev", expand="openapi-3.0")["models"]
    document = client.get("/api/openapi/queue/openapi.json", params={"endpoint_id": "fal-ai/flux/dev"}).json()
    assert model["openapi"]["paths"] == document["paths"]
    assert endpoint_ids(list_models(client, endpoint_id="test/null,fal-ai/flux/dev")) == [
        "test/null",
        "fal-ai/flux/dev",
    ]


def test_prices_are_zero(client: httpx.Client) -> None:
    answer = client.get("/v1/models/pricing", params={"endpoint_id": "fal-ai/flux/dev"}, headers=API).json()
    price = {"endpoint_id": "fal-ai/flux/dev", "unit_price": 0.0, "unit": "megapixels", "currency": "USD"}
    assert answer == {"prices": [price], "next_cursor": None, "has_more": False}
    body = {"estimate_type": "unit_price", "endpoints": {"fal-ai/flux/dev": {"unit_quantity": 50}}}
    answer = client.post("/v1/models/pricing/estimate", json=body, headers=API).json()
    assert answer == {"estimate_type": "unit_price", "total_cost": 0.0, "currency": "USD"}


def test_usage_counts_megapixels(keyless_client: httpx.Client) -> None:
    alice, bob = ({**API, "authorization": f"Key {name}:secret"} for name in ("alice", "bob"))

    def get_usage(headers: dict[str, str], **query: Any) -> Any:
        answer = keyless_client.get("/v1/models/usage", params=query, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def megapixels() -> int:
        lines = [
            line for bucket in get_usage(alice, endpoint_id="test/null")["time_series"] for line in bucket["results"]
        ]
        return sum(line["quantity"] for line in lines)

    before = megapixels()
    body = {"prompt": "x", "num_images": 2, "image_size": {"width": 1024, "height": 1024}, "num_inference_steps": 1}
    response = keyless_client.post("/test/null", json=body, headers={"authorization": alice["authorization"]})
    assert response.status_code == 200
    # 1024x1024 exceeds one megapixel, and each image rounds up to two.
    assert megapixels() == before + 4
    today = datetime.now(UTC).date()
    (bucket,) = get_usage(alice, endpoint_id="test/null", start=str(today))["time_series"]
    assert bucket["bucket"] == f"{today}T00:00:00+00:00"
    (line,) = bucket["results"]
    assert (line["endpoint_id"], line["unit"], line["cost"]) == ("test/null", "megapixels", 0)
    summary = get_usage(alice, endpoint_id="test/null", start=str(today), expand="summary")
    assert (summary["summary"], "time_series" in summary) == ([line], False)
    earlier = {"start": f"{today - timedelta(days=9)}", "end": f"{today - timedelta(days=2)}"}
    assert get_usage(alice, **earlier)["time_series"] == get_usage(bob, endpoint_id="test/unknown")["time_series"] == []
    assert keyless_client.get("/v1/models/usage", headers=API).status_code == 401


@pytest.mark.parametrize(
    ("path", "query", "field"),
    [
        ("/v1/models", {"limit": 0}, "limit"),
        ("/v1/models", {"cursor": "x"}, "cursor"),
        ("/v1/models", {"expand": "everything"}, "expand"),
        ("/v1/models/pricing", {}, "endpoint_id"),
        ("/v1/models/usage", {"timeframe": "minute"}, "timeframe"),
        ("/v1/models/usage", {"start": "yesterday"}, "start"),
        ("/v1/models/requests/by-endpoint", {"limit": 101}, "limit"),
    ],
)
def test_the_error_names_the_bad_parameter(client: httpx.Client, path: str, query: dict[str, Any], field: str) -> None:
    answer = client.get(path, params=query, headers=API)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][:2] == ["query", field]


def test_the_error_names_the_bad_fields_of_an_estimate(client: httpx.Client) -> None:
    answer = client.post("/v1/models/pricing/estimate", json={"estimate_type": "guess"}, headers=API)
    assert {entry["loc"][1] for entry in answer.json()["detail"]} == {"estimate_type", "endpoints"}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/pricing"])
def test_unknown_endpoint_ids_return_404(client: httpx.Client, path: str) -> None:
    answer = client.get(path, params={"endpoint_id": "fal-ai/kling-video"}, headers=API)
    assert answer.status_code == 404
    assert "not offered by this server" in answer.json()["detail"]


def test_openais_model_list_keeps_its_path(client: httpx.Client) -> None:
    assert client.get("/v1/models").json()["object"] == "list"
    assert client.get("/v1/models", headers={"host": "fal.run"}).json()["object"] == "list"


def test_the_proxy_route_reaches_the_platform_api(client: httpx.Client) -> None:
    target = {"x-fal-target-url": "https://api.fal.ai/v1/models?endpoint_id=test/null"}
    assert endpoint_ids(client.get(PROXY, headers=target).json()) == ["test/null"]


@pytest.mark.parametrize("host", ["made-up.fal.run", "gateway.alpha.fal.ai", "fal.dev", "x.fal.dev", "docs.fal.ai"])
@pytest.mark.parametrize("way", ["host", "proxy"])
def test_unsupported_fal_hosts_return_404(client: httpx.Client, host: str, way: str) -> None:
    path, headers = (
        ("/status", {"host": host}) if way == "host" else (PROXY, {"x-fal-target-url": f"https://{host}/status"})
    )
    answer = client.post(path, headers=headers, json={"prompt": "x"})
    assert answer.status_code == 404
    assert answer.json()["detail"] == f"https://{host}/status is not offered by this server"


@pytest.mark.parametrize(
    ("host", "path"),
    [
        ("api.fal.ai", "/v1/serverless/apps"),
        ("api.fal.ai", "/v1/keys"),
        ("fal.ai", "/dashboard"),
        ("rest.fal.ai", "/billing"),
        ("fal.run", "/fal-ai/kling-video"),
        ("queue.fal.run", "/fal-ai/kling-video"),
    ],
)
def test_unsupported_paths_return_404(client: httpx.Client, host: str, path: str) -> None:
    answer = client.post(path, headers={"host": host}, json={"prompt": "x"})
    assert answer.status_code == 404
    assert "not offered by this server" in answer.json()["detail"]


@pytest.mark.parametrize(
    "url", ["https://example.com/x", "https://notfal.ai/x", "https://fal.ai.example.com/x", "http://fal.run/x"]
)
def test_the_proxy_route_refuses_other_hosts(client: httpx.Client, url: str) -> None:
    assert client.get(PROXY, headers={"x-fal-target-url": url}).status_code == 400


@pytest.mark.parametrize("path", ["/platform/v1/models", "/status.json", "/metrics", "/v1/models", "/files/x"])
def test_the_proxy_route_cannot_reach_operator_paths(client: httpx.Client, path: str) -> None:
    assert client.get(PROXY, headers={"x-fal-target-url": f"https://fal.run{path}"}).status_code == 404


def test_fal_ai_serves_endpoint_docs(client: httpx.Client) -> None:
    site = {"host": "fal.ai"}
    assert client.get("/models/test/null/llms.txt", headers=site).text.startswith("# test/null")
    query = {"endpoint_id": "test/null"}
    assert client.get("/api/openapi/queue/openapi.json", params=query, headers=site).json()["openapi"] == "3.0.4"


# -- released programs


def run_program(tmp_path: Path, package: str, version: str) -> dict[str, Any]:
    """Run the commands of an unmodified program under `flux-server run` and return their outputs."""
    package_dir = download_package(package, version)
    ports = {name: str(free_port()) for name in ("port", "tls_port", "proxy_port")}
    with serving(tmp_path / "data", TEST_MODELS, **ports) as server:
        server.ready()
        environment = {"PYTHONPATH": f"{package_dir}{os.pathsep}{ROOT}", "HOME": str(tmp_path)}
        arguments = [package, "test/null", str(tmp_path / "out")]
        process = run_under_flux_server(
            server,
            [sys.executable, "-W", "ignore", "-m", "tests.support.platform_calls", *arguments],
            environment,
            cwd=tmp_path,
        )
    assert process.returncode == 0, process.stderr
    output: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return output


@pytest.mark.thorough
@pytest.mark.timeout(400)
def test_genvoy_commands(tmp_path: Path) -> None:
    output = run_program(tmp_path, "genvoy", "0.1.0")
    assert endpoint_ids(output["search_models"]) == ["test/null"]
    assert output["get_schema"]["openapi"] == "3.0.4"
    assert output["estimate_cost"]["pricing"]["prices"][0]["unit_price"] == 0
    assert output["estimate_cost"]["estimate"]["total_cost"] == 0
    assert Path(output["generate"]["output_path"]).stat().st_size > 0
    assert (len(output["generate_batch"]["files"]), output["generate_batch"]["failed"]) == (2, [])
    # The second endpoint needs an input image and reports that it is missing.
    (succeeded,), (failed,) = output["generate_compare"]["files"], output["generate_compare"]["failed"]
    assert (succeeded["model_id"], failed["model_id"]) == ("test/null", "test/copy")
    assert "image_url" in failed["error"]
    assert output["get_job_status"]["status"] == "COMPLETED"
    assert "ALREADY_COMPLETED" in output["cancel_job"]
    assert "test/null" in endpoint_ids(output["models"])
    (today,) = output["recent"]["time_series"]
    assert today["results"][0]["endpoint_id"] == "test/null"


@pytest.mark.timeout(400)
def test_falgen_commands(tmp_path: Path) -> None:
    output = run_program(tmp_path, "falgen", "0.1.1")
    assert output["generate"]["result"]["prompt"] == "a red apple"
    assert [model["endpoint_id"] for model in output["search_models"]["models"]] == ["test/null"]
    assert "prompt" in output["model_info"]["input_schema"]["properties"]
    assert output["get_pricing"]["pricing"][0]["prices"][0]["unit_price"] == 0
    (line,) = output["check_usage"]["summary"]
    assert (line["endpoint_id"], line["quantity"]) == ("test/null", 1)
    assert len(output["check_usage by day"]["time_series"]) == 1
    assert [item["endpoint_id"] for item in output["request_history"]["items"]] == ["test/null"]
    assert output["list_workflows"] == {"ok": True, "workflows": [], "next_cursor": None, "has_more": False}
    assert output["upload"].startswith("http://127.0.0.1:")
    # falgen's chat needs a language model, which this server does not offer.
    assert "not offered by this server" in output["chat"]["detail"]
