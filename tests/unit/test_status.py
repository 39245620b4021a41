"""Tests of the status overview for the operator."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.errors import InternalError
from server.queue.jobs import Outcome
from server.status import DAY, MINUTES, load_overview
from tests.support.components import Clock, Components, claim_job, open_components
from tests.support.components import success as successful_outcome
from tests.support.server_process import TEST_MODELS, serving


@pytest.fixture
def components(tmp_path: Path) -> Iterator[Components]:
    with open_components(tmp_path, clock=Clock()) as opened_parts:
        yield opened_parts


def test_the_overview_covers_the_last_hour(components: Components) -> None:
    for _ in range(3):
        job = claim_job(components)
        components.clock.now += 90
        components.queue.finish(job, successful_outcome())
    failed = claim_job(components, endpoint="test/raises")
    components.queue.finish(failed, Outcome.from_error(InternalError("It broke.")))
    components.clock.now += 60
    overview = load_overview(components.database, components.clock.now)
    assert len(overview["minutes"]) == MINUTES
    # One request ended 240 seconds ago, one 150 seconds ago, and two 60 seconds ago.
    assert [minute["ended"] for minute in overview["minutes"][-4:]] == [1, 1, 0, 2]
    assert [sum(minute[name] for minute in overview["minutes"]) for name in ("ended", "completed")] == [4, 3]
    assert overview["endpoints"] == [{"endpoint": "test/null", "completed": 3, "wait": 0.0, "inference": 1.5}]
    assert [(each["request_id"], each["error"]) for each in overview["failures"]] == [(failed.request_id, "It broke.")]
    components.clock.now += 3600
    later = load_overview(components.database, components.clock.now)
    assert not any(minute["ended"] for minute in later["minutes"])
    assert later["endpoints"] == []
    assert later["usage"] == [{"owner": "me", "requests": 3, "billable_units": 0}]


def test_times_of_the_last_day_are_grouped_by_size_and_tier(components: Components) -> None:
    """Responses with inline images count under an unknown size, and damaged ones too."""
    sized = '{"images": [{"url": "u", "width": 512, "height": 768}]}'
    for body, tier, seconds in [
        (sized, "none", 1.0),
        (sized, "none", 3.0),
        (sized, "high", 0.5),
        ('{"images": "' + "x" * 20_000 + '"}', "none", 7.0),
        ("{damaged", "none", 9.0),
    ]:
        outcome = Outcome(200, body, inference_time=seconds, provenance={"acceleration": tier})
        components.queue.finish(claim_job(components), outcome)
    components.clock.now += DAY - 10
    assert load_overview(components.database, components.clock.now)["times"] == [
        {"size": "512x768", "acceleration": "none", "requests": 2, "mean": 2.0, "fastest": 1.0, "slowest": 3.0},
        {"size": "unknown", "acceleration": "none", "requests": 2, "mean": 8.0, "fastest": 7.0, "slowest": 9.0},
        {"size": "512x768", "acceleration": "high", "requests": 1, "mean": 0.5, "fastest": 0.5, "slowest": 0.5},
    ]
    assert load_overview(components.database, components.clock.now + 20)["times"] == []


def test_the_overview_over_http(tmp_path: Path) -> None:
    with (
        serving(tmp_path, TEST_MODELS, keys="one,two", operator_keys="boss") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        for key in ("one", "one", "two"):
            response = client.post("/test/null", json={"prompt": "x"}, headers={"authorization": f"Key {key}"})
            assert response.status_code == 200
        assert client.get("/status.json").status_code == 401
        assert client.get("/playground/steps.json").status_code == 401
        steps = client.get("/playground/steps.json", headers={"authorization": "Key one"}).json()["steps"]
        assert [each["size"] for each in steps] == ["1024x768"]
        assert client.get("/status.json", headers={"authorization": "Key one"}).status_code == 403
        overview = client.get("/status.json", headers={"authorization": "Key boss"}).json()
        assert client.get("/status").headers["content-type"].startswith("text/html")
    assert sorted((each["requests"], each["billable_units"]) for each in overview["usage"]) == [(1, 1), (2, 2)]
    assert (overview["is_ready"], overview["now"]["queue_length"]) == (True, 0)
    assert "test/null" in overview["served"]
