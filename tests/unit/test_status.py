"""What the operator sees at a glance."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.errors import InternalError
from server.queue.jobs import Outcome
from server.status import MINUTES, load_overview
from tests.support.components import Clock, Parts, claimed, opened
from tests.support.components import painted as well
from tests.support.server_process import TEST_MODELS, serving


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with opened(tmp_path, clock=Clock()) as opened_parts:
        yield opened_parts


def test_the_last_hour(parts: Parts) -> None:
    for _ in range(3):
        job = claimed(parts)
        parts.clock.now += 90
        parts.queue.finish(job, well())
    failed = claimed(parts, endpoint="test/raises")
    parts.queue.finish(failed, Outcome.from_error(InternalError("It broke.")))
    parts.clock.now += 60
    seen = load_overview(parts.database, parts.clock.now)
    assert len(seen["minutes"]) == MINUTES
    # The first ended 240 seconds ago, then one 150, and two 60 seconds ago.
    assert [minute["ended"] for minute in seen["minutes"][-4:]] == [1, 1, 0, 2]
    assert [sum(minute[name] for minute in seen["minutes"]) for name in ("ended", "completed")] == [4, 3]
    assert seen["endpoints"] == [{"endpoint": "test/null", "completed": 3, "wait": 0.0, "inference": 1.5}]
    assert [(each["request_id"], each["error"]) for each in seen["failures"]] == [(failed.request_id, "It broke.")]
    parts.clock.now += 3600
    later = load_overview(parts.database, parts.clock.now)
    assert not any(minute["ended"] for minute in later["minutes"])
    assert later["endpoints"] == []
    assert later["usage"] == [{"owner": "me", "requests": 3, "billable_units": 0}]


def test_over_the_wire(tmp_path: Path) -> None:
    with (
        serving(tmp_path, TEST_MODELS, keys="one,two", operator_keys="boss") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        for key in ("one", "one", "two"):
            answer = client.post("/test/null", json={"prompt": "x"}, headers={"authorization": f"Key {key}"})
            assert answer.status_code == 200
        assert client.get("/status.json").status_code == 401
        assert client.get("/status.json", headers={"authorization": "Key one"}).status_code == 403
        seen = client.get("/status.json", headers={"authorization": "Key boss"}).json()
        assert client.get("/status").headers["content-type"].startswith("text/html")
    assert sorted((each["requests"], each["billable_units"]) for each in seen["usage"]) == [(1, 1), (2, 2)]
    assert (seen["is_ready"], seen["now"]["queue_length"]) == (True, 0)
    assert "test/null" in seen["served"]
