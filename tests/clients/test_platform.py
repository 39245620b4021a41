"""fal's platform API: by itself, under the Host api.fal.ai, through the proxy route, and with released programs."""

import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.test_run import ran
from tests.support.connect_clients import fetched
from tests.support.server_process import ROOT, TEST_MODELS, free_port, serving

API = {"host": "api.fal.ai"}
PROXY = "/api/fal/proxy"


def listed(client: httpx.Client, **query: Any) -> dict[str, Any]:
    """Models, as api.fal.ai lists them."""
    answer = client.get("/v1/models", params=query, headers=API)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def names(page: dict[str, Any]) -> list[str]:
    return [model["endpoint_id"] for model in page["models"]]


def test_every_served_endpoint_is_listed(client: httpx.Client) -> None:
    page = listed(client)
    assert {"fal-ai/flux/dev", "fal-ai/flux/dev/image-to-image", "test/null"} <= set(names(page))
    assert (page["next_cursor"], page["has_more"]) == (None, False)
    (dev,) = [model for model in page["models"] if model["endpoint_id"] == "fal-ai/flux/dev"]
    about = dev["metadata"]
    assert (about["display_name"], about["category"], about["status"]) == ("flux/dev", "text-to-image", "active")
    assert "openapi" not in dev


def test_a_search_finds_words_and_categories(client: httpx.Client) -> None:
    assert names(listed(client, q="flux schnell")) == ["fal-ai/flux/schnell"]
    assert names(listed(client, q="no such thing")) == []
    both = set(names(listed(client, category="text-to-image"))) | set(names(listed(client, category="image-to-image")))
    assert both == set(names(listed(client)))
    assert "fal-ai/flux/dev/image-to-image" not in names(listed(client, category="text-to-image"))
    assert names(listed(client, status="deprecated")) == []


def test_pages_follow_each_other(client: httpx.Client) -> None:
    found: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = listed(client, limit=3, **cursor)
        found += names(page)
        if not page["has_more"]:
            break
        assert len(page["models"]) == 3
        cursor = {"cursor": page["next_cursor"]}
    assert found == names(listed(client))


def test_one_model_brings_its_openapi_document(client: httpx.Client) -> None:
    (model,) = listed(client, endpoint_id="fal-ai/flux/dev", expand="openapi-3.0")["models"]
    own = client.get("/api/openapi/queue/openapi.json", params={"endpoint_id": "fal-ai/flux/dev"}).json()
    assert model["openapi"]["paths"] == own["paths"]
    assert names(listed(client, endpoint_id="test/null,fal-ai/flux/dev")) == ["test/null", "fal-ai/flux/dev"]


def test_nothing_is_charged(client: httpx.Client) -> None:
    answer = client.get("/v1/models/pricing", params={"endpoint_id": "fal-ai/flux/dev"}, headers=API).json()
    price = {"endpoint_id": "fal-ai/flux/dev", "unit_price": 0.0, "unit": "megapixels", "currency": "USD"}
    assert answer == {"prices": [price], "next_cursor": None, "has_more": False}
    planned = {"estimate_type": "unit_price", "endpoints": {"fal-ai/flux/dev": {"unit_quantity": 50}}}
    answer = client.post("/v1/models/pricing/estimate", json=planned, headers=API).json()
    assert answer == {"estimate_type": "unit_price", "total_cost": 0.0, "currency": "USD"}


def test_usage_is_what_is_counted(keyed_client: httpx.Client) -> None:
    alice, bob = ({**API, "authorization": f"Key {name}:secret"} for name in ("alice", "bob"))

    def used(headers: dict[str, str], **query: Any) -> Any:
        answer = keyed_client.get("/v1/models/usage", params=query, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def megapixels() -> int:
        lines = [line for bucket in used(alice, endpoint_id="test/null")["time_series"] for line in bucket["results"]]
        return sum(line["quantity"] for line in lines)

    before = megapixels()
    body = {"prompt": "x", "num_images": 2, "image_size": {"width": 1024, "height": 1024}, "num_inference_steps": 1}
    asked = keyed_client.post("/test/null", json=body, headers={"authorization": alice["authorization"]})
    assert asked.status_code == 200
    # 1024x1024 is more than one megapixel, and every image is rounded up.
    assert megapixels() == before + 4
    today = datetime.now(UTC).date()
    (bucket,) = used(alice, endpoint_id="test/null", start=str(today))["time_series"]
    assert bucket["bucket"] == f"{today}T00:00:00+00:00"
    (line,) = bucket["results"]
    assert (line["endpoint_id"], line["unit"], line["cost"]) == ("test/null", "megapixels", 0)
    summed = used(alice, endpoint_id="test/null", start=str(today), expand="summary")
    assert (summed["summary"], "time_series" in summed) == ([line], False)
    earlier = {"start": f"{today - timedelta(days=9)}", "end": f"{today - timedelta(days=2)}"}
    assert used(alice, **earlier)["time_series"] == used(bob, endpoint_id="test/unknown")["time_series"] == []
    assert keyed_client.get("/v1/models/usage", headers=API).status_code == 401


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
def test_a_bad_parameter_is_named(client: httpx.Client, path: str, query: dict[str, Any], field: str) -> None:
    answer = client.get(path, params=query, headers=API)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][:2] == ["query", field]


def test_a_bad_estimate_is_named(client: httpx.Client) -> None:
    answer = client.post("/v1/models/pricing/estimate", json={"estimate_type": "guess"}, headers=API)
    assert {entry["loc"][1] for entry in answer.json()["detail"]} == {"estimate_type", "endpoints"}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/pricing"])
def test_an_endpoint_that_is_not_here_is_not_found(client: httpx.Client, path: str) -> None:
    answer = client.get(path, params={"endpoint_id": "fal-ai/kling-video"}, headers=API)
    assert answer.status_code == 404
    assert "not offered by this server" in answer.json()["detail"]


def test_openais_models_stay_where_they_are(client: httpx.Client) -> None:
    assert client.get("/v1/models").json()["object"] == "list"
    assert client.get("/v1/models", headers={"host": "fal.run"}).json()["object"] == "list"


def test_the_proxy_route_leads_there(client: httpx.Client) -> None:
    target = {"x-fal-target-url": "https://api.fal.ai/v1/models?endpoint_id=test/null"}
    assert names(client.get(PROXY, headers=target).json()) == ["test/null"]


@pytest.mark.parametrize("host", ["made-up.fal.run", "gateway.alpha.fal.ai", "fal.dev", "x.fal.dev", "docs.fal.ai"])
@pytest.mark.parametrize("way", ["host", "proxy"])
def test_a_name_that_nothing_is_offered_under(client: httpx.Client, host: str, way: str) -> None:
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
def test_what_is_not_offered_is_said_to_be(client: httpx.Client, host: str, path: str) -> None:
    answer = client.post(path, headers={"host": host}, json={"prompt": "x"})
    assert answer.status_code == 404
    assert "not offered by this server" in answer.json()["detail"]


@pytest.mark.parametrize(
    "url", ["https://example.com/x", "https://notfal.ai/x", "https://fal.ai.example.com/x", "http://fal.run/x"]
)
def test_the_proxy_route_leads_nowhere_else(client: httpx.Client, url: str) -> None:
    assert client.get(PROXY, headers={"x-fal-target-url": url}).status_code == 400


@pytest.mark.parametrize("path", ["/platform/v1/models", "/status.json", "/metrics", "/v1/models", "/files/x"])
def test_the_proxy_route_reaches_nothing_of_the_operators(client: httpx.Client, path: str) -> None:
    assert client.get(PROXY, headers={"x-fal-target-url": f"https://fal.run{path}"}).status_code == 404


def test_the_site_has_its_documents(client: httpx.Client) -> None:
    site = {"host": "fal.ai"}
    assert client.get("/models/test/null/llms.txt", headers=site).text.startswith("# test/null")
    query = {"endpoint_id": "test/null"}
    assert client.get("/api/openapi/queue/openapi.json", params=query, headers=site).json()["openapi"] == "3.0.4"


# -- released programs


def called(tmp_path: Path, package: str, version: str) -> dict[str, Any]:
    """What this program was answered, run unchanged under `flux-server run`."""
    folder = fetched(package, version)
    ports = {name: str(free_port()) for name in ("port", "tls_port", "proxy_port")}
    with serving(tmp_path / "data", TEST_MODELS, **ports) as server:
        server.ready()
        outside = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "HOME": str(tmp_path)}
        arguments = [package, "test/null", str(tmp_path / "out")]
        done = ran(
            server,
            [sys.executable, "-W", "ignore", "-m", "tests.support.platform_calls", *arguments],
            outside,
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(400)
def test_every_command_of_genvoy(tmp_path: Path) -> None:
    said = called(tmp_path, "genvoy", "0.1.0")
    assert names(said["search_models"]) == ["test/null"]
    assert said["get_schema"]["openapi"] == "3.0.4"
    assert said["estimate_cost"]["pricing"]["prices"][0]["unit_price"] == 0
    assert said["estimate_cost"]["estimate"]["total_cost"] == 0
    assert Path(said["generate"]["output_path"]).stat().st_size > 0
    assert (len(said["generate_batch"]["files"]), said["generate_batch"]["failed"]) == (2, [])
    # The second endpoint wants a picture to begin with, and says so.
    (good,), (bad,) = said["generate_compare"]["files"], said["generate_compare"]["failed"]
    assert (good["model_id"], bad["model_id"]) == ("test/null", "test/copy")
    assert "image_url" in bad["error"]
    assert said["get_job_status"]["status"] == "COMPLETED"
    assert "ALREADY_COMPLETED" in said["cancel_job"]
    assert "test/null" in names(said["models"])
    (today,) = said["recent"]["time_series"]
    assert today["results"][0]["endpoint_id"] == "test/null"


@pytest.mark.timeout(400)
def test_every_command_of_falgen(tmp_path: Path) -> None:
    said = called(tmp_path, "falgen", "0.1.1")
    assert said["generate"]["result"]["prompt"] == "a red apple"
    assert [found["endpoint_id"] for found in said["search_models"]["models"]] == ["test/null"]
    assert "prompt" in said["model_info"]["input_schema"]["properties"]
    assert said["get_pricing"]["pricing"][0]["prices"][0]["unit_price"] == 0
    (line,) = said["check_usage"]["summary"]
    assert (line["endpoint_id"], line["quantity"]) == ("test/null", 1)
    assert len(said["check_usage by day"]["time_series"]) == 1
    assert [item["endpoint_id"] for item in said["request_history"]["items"]] == ["test/null"]
    assert said["list_workflows"] == {"ok": True, "workflows": [], "next_cursor": None, "has_more": False}
    assert said["upload"].startswith("http://127.0.0.1:")
    # Its conversations need a language model, which is not offered here.
    assert "not offered by this server" in said["chat"]["detail"]
