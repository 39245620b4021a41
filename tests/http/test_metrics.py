"""/metrics, parsed as Prometheus parses it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pytest_httpserver import HTTPServer

from server.metrics import Metrics
from tests.support.server_process import ROOT, TEST_MODELS, Gate, serving, wait_until_claimed, wait_until_completed

Labels = tuple[tuple[str, str], ...]
QUEUED = "/queue/test/null"


@pytest.fixture
def quiet_client(tmp_path: Path) -> Iterator[httpx.Client]:
    """Open a client of a server that no other test calls."""
    with (
        serving(tmp_path / "data", TEST_MODELS, max_running="1", outbound_allow="127.0.0.0/8") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        yield client


def read(client: httpx.Client, **headers: str) -> dict[tuple[str, Labels], float]:
    """Read all samples; return their values by name (without the prefix) and labels."""
    answer = client.get("/metrics", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name.removeprefix("flux_server_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def labels_of(endpoint: str, **more: str) -> Labels:
    return tuple(sorted({"endpoint": endpoint, **more}.items()))


def test_requests_and_images(quiet_client: httpx.Client) -> None:
    body = {"prompt": "x", "num_images": 3, "num_inference_steps": 5, "image_size": "square"}
    assert quiet_client.post("/test/null", json=body).status_code == 200
    assert quiet_client.post("/test/unsafe", json={"prompt": "x"}).json()["has_nsfw_concepts"] == [True]
    assert quiet_client.post("/test/raises", json={"prompt": "x"}).status_code == 500
    found = read(quiet_client)
    assert found["images_total", labels_of("test/null")] == 3
    assert found["images_flagged_total", labels_of("test/null")] == 0
    assert found["images_flagged_total", labels_of("test/unsafe")] == 1
    assert found["requests_submitted_total", labels_of("test/raises")] == 1
    assert found["requests_ended_total", labels_of("test/null", outcome="completed")] == 1
    assert found["requests_ended_total", labels_of("test/raises", outcome="failed")] == 1
    assert found["queue_wait_seconds_count", labels_of("test/null")] == 1
    steps = tuple(sorted({"size": "512x512", "acceleration": "none"}.items()))
    assert found["step_seconds_count", steps] == 15
    assert found["ready", ()] == 1
    assert found["memory_resident_bytes", ()] > 10e6
    assert found["disk_free_bytes", ()] > 0
    assert found["files_bytes", ()] > 0


def test_the_queue(quiet_client: httpx.Client, gate: Gate) -> None:
    running = quiet_client.post("/queue/test/gate", json={"prompt": str(gate.path), "num_inference_steps": 1}).json()
    wait_until_claimed(quiet_client, running["status_url"])
    waiting = [quiet_client.post(QUEUED, json={"prompt": "x"}).json() for _ in range(2)]
    found = read(quiet_client)
    assert (found["queue_length", ()], found["requests_running", ()]) == (2, 1)
    assert found["queue_oldest_seconds", ()] > 0
    quiet_client.put(waiting[0]["cancel_url"])
    gate.release_all()
    wait_until_completed(quiet_client, waiting[1]["status_url"])
    found = read(quiet_client)
    assert (found["queue_length", ()], found["queue_oldest_seconds", ()]) == (0, 0)
    assert found["requests_ended_total", labels_of("test/null", outcome="cancelled")] == 1


def test_http(quiet_client: httpx.Client) -> None:
    for path in ("/health", "/health", "/nothing/here/1", "/nothing/here/2"):
        quiet_client.get(path)
    found = {labels: value for (name, labels), value in read(quiet_client).items() if name == "http_requests_total"}
    assert found[("method", "GET"), ("route", "/health"), ("status", "200")] == 2
    assert not any("nothing" in label for labels in found for _, label in labels)


def test_ended_requests_count_from_zero() -> None:
    """Export a zero before the first request ends: an alarm on an increase needs the value before the first failure."""
    text = Metrics(["a/b"]).text().decode()
    for outcome in ("completed", "failed", "cancelled"):
        assert f'flux_server_requests_ended_total{{endpoint="a/b",outcome="{outcome}"}} 0.0' in text


def test_custom_sizes_share_one_label() -> None:
    metrics = Metrics()
    for width in range(64, 2048, 32):
        metrics.observe_step((width, 64), "none", 0.1)
    assert metrics.text().count(b"flux_server_step_seconds_count{") == 1


def test_names_and_units_follow_prometheus_conventions(quiet_client: httpx.Client) -> None:
    """Check the prefix, base units and that every metric has a description."""
    for family in text_string_to_metric_families(quiet_client.get("/metrics").text):
        assert family.name.startswith("flux_server_")
        assert family.documentation.endswith(".")
        assert not family.name.endswith(("_ms", "_mb", "_gb", "_percent"))


@pytest.mark.parametrize(
    ("keys", "operators", "key", "status"),
    [
        ("one", "", "one", 200),
        ("one", "", "wrong", 401),
        ("one,two", "", "one", 403),
        ("one,two", "boss", "two", 403),
        ("one,two", "boss", "boss", 200),
        ("one,boss", "boss", "boss", 200),
        ("", "boss", "boss", 200),
    ],
)
def test_who_may_read(tmp_path: Path, keys: str, operators: str, key: str, status: int) -> None:
    with serving(tmp_path, TEST_MODELS, keys=keys, operator_keys=operators) as server:
        answer = httpx.get(f"{server.url}/metrics", headers={"authorization": f"Key {key}"}, trust_env=False)
        assert answer.status_code == status
        if status == 200:
            answer = httpx.post(
                f"{server.url}/test/null", json={"prompt": "x"}, headers={"authorization": f"Key {key}"}, timeout=60
            )
            assert answer.status_code == 200


def test_answers_sent_before_any_route(quiet_client: httpx.Client) -> None:
    """Count requests refused for their host or their size, so that alerts on these answers work."""
    assert quiet_client.get("/health", headers={"host": "elsewhere.example"}).status_code == 421
    assert quiet_client.post("/test/null", content=b"x" * (41 * 2**20)).status_code == 413
    found = read(quiet_client)
    for status in ("421", "413"):
        assert [
            value
            for (name, labels), value in found.items()
            if name == "http_requests_total" and ("status", status) in labels
        ] == [1]


def test_webhooks(quiet_client: httpx.Client, httpserver: HTTPServer) -> None:
    httpserver.expect_ordered_request("/hook").respond_with_data("")
    with httpserver.wait(raise_assertions=True, stop_on_nohandler=False):
        quiet_client.post(QUEUED, params={"fal_webhook": httpserver.url_for("/hook")}, json={"prompt": "x"})
    delivered = "webhook_attempts_total", (("outcome", "delivered"),)
    while read(quiet_client).get(delivered) != 1:
        pass
    assert read(quiet_client)["webhooks_due", ()] == 0


def expressions() -> list[str]:
    """List every query of the dashboard, with Grafana's variables filled in."""
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    return [
        target["expr"].replace("$__rate_interval", "5m").replace("$instance", ".*")
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]


@pytest.mark.parametrize("expression", expressions())
def test_the_dashboards_queries_are_valid_promql(expression: str) -> None:
    assert promql_parser.parse(expression)


def test_the_dashboard_shows_every_metric(quiet_client: httpx.Client) -> None:
    """Check both ways: every metric is on a panel, and every panel shows a metric that exists."""
    quiet_client.post("/test/raises", json={"prompt": "x"})
    queried = set(re.findall(r"flux_server_\w+", " ".join(expressions())))
    names = set()
    for family in text_string_to_metric_families(quiet_client.get("/metrics").text):
        suffix = {"counter": "_total", "histogram": "_bucket"}.get(family.type, "")
        if not family.name.endswith("_created"):
            names.add(family.name + suffix)
    assert queried == names
