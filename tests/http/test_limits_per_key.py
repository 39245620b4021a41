"""Limits of one key: its share of the queue and of running requests, and its request rate."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.rate_limit import RateLimiter
from server.errors import TooManyRequests
from server.queue.jobs import Job, Mode, Priority, State
from server.queue.waiting_index import WaitingIndex
from tests.support.components import Components, claim_job, open_components, submission, success
from tests.support.server_process import TEST_MODELS, Gate, serving, wait_until_claimed, wait_until_completed


@pytest.fixture
def components(tmp_path: Path) -> Iterator[Components]:
    with open_components(tmp_path, max_length_per_owner=2, max_running_per_owner=2) as opened_parts:
        yield opened_parts


def submitted(components: Components, owner: str, **changes: Any) -> Job:
    return components.queue.submit(submission(owner=owner, **changes))


def owners_claimed(components: Components) -> list[str]:
    """Claim requests until none may start; return their owners."""
    owners = []
    while claim := components.queue.claim():
        owners.append(claim[0].owner)
    return owners


def test_a_key_may_fill_only_its_share_of_the_queue(components: Components) -> None:
    for _ in range(2):
        submitted(components, "me")
    with pytest.raises(TooManyRequests, match="already has 2 waiting requests") as refused:
        submitted(components, "me")
    assert refused.value.headers["retry-after"] == "5"
    submitted(components, "you")
    components.queue.claim()
    submitted(components, "me")


def test_a_key_may_run_only_its_share_of_requests(components: Components) -> None:
    mine = [submitted(components, "me") for _ in range(2)]
    assert owners_claimed(components) == ["me", "me"]
    waiting = [submitted(components, "me"), submitted(components, "me"), submitted(components, "you")]
    assert owners_claimed(components) == ["you"]
    # The position of waiting requests does not change.
    assert [components.queue.position(job) for job in waiting[:2]] == [0, 1]
    assert components.queue.claim() is None
    assert components.queue.finish(mine[0], success())
    assert owners_claimed(components) == ["me"]
    components.queue.release(mine[1])
    assert [claim[0] for claim in iter(components.queue.claim, None) if claim] == [mine[1]]


def test_the_counts_are_right_after_every_way_to_end(components: Components) -> None:
    """Cancel a waiting request, a running one, and one that was released; then submit again."""
    for _ in range(5):
        waiting = submitted(components, "me")
        components.queue.cancel(waiting)
        running = claim_job(components, owner="me")
        components.queue.cancel(running)
        components.queue.finish(running, success())
        released = claim_job(components, owner="me")
        components.queue.release(released)
        components.queue.cancel(released)
    for _ in range(2):
        submitted(components, "me")
    assert owners_claimed(components) == ["me", "me"]


def test_the_counts_match_the_rows_after_a_restart(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        for mode in ("queue", "run", "queue"):
            submitted(components, "me", mode=mode)
        components.queue.claim()
    with open_components(tmp_path, max_length_per_owner=2) as components:
        components.queue.recover()
        with pytest.raises(TooManyRequests):
            submitted(components, "me")


def test_owners_without_requests_use_no_memory() -> None:
    index = WaitingIndex()
    for number in range(100):
        job = _job(number)
        index.add_waiting(job)
        index.start(job)
        index.finish(job)
    assert not any((*index._waiting.values(), *index._running.values(), index._jobs, len(index)))


def _job(number: int) -> Job:
    return Job(number, str(number), "a/b", f"owner {number}", Mode.QUEUE, Priority.NORMAL, "", State.IN_QUEUE)


def test_each_key_has_a_separate_rate() -> None:
    limiter = RateLimiter("2/hour")
    limiter.acquire("me")
    limiter.acquire("me")
    limiter.acquire("you")
    with pytest.raises(TooManyRequests, match="2 per 1 hour") as refused:
        limiter.acquire("me")
    assert 3500 < int(refused.value.headers["retry-after"]) <= 3600


def test_no_rate_is_no_limit() -> None:
    for _ in range(1000):
        RateLimiter("").acquire("me")


ENDPOINTS = [
    ("POST", "/test/null"),
    ("POST", "/queue/test/null"),
    ("POST", "/test/null/stream"),
    ("POST", "/v1/images/generations"),
]


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_requests_count_on_every_route(tmp_path: Path, method: str, path: str) -> None:
    body = {"prompt": "x", "model": "test/null"}
    one, two = ({"authorization": f"Key {key}"} for key in ("one", "two"))
    with (
        serving(tmp_path, TEST_MODELS, keys="one,two", rate_per_key="2 per day") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        # Refused requests do not count.
        assert client.request(method, path, json={**body, "prompt": 5}, headers=one).status_code in (400, 422)
        statuses = [client.request(method, path, json=body, headers=one).status_code for _ in range(3)]
        refused = client.request(method, path, json=body, headers=one)
        assert client.request(method, path, json=body, headers=two).status_code == 200
    assert statuses == [200, 200, 429]
    assert int(refused.headers["retry-after"]) > 80_000
    assert "2 per 1 day" in refused.text


@pytest.mark.parametrize("path", ["/storage/upload/initiate", "/files/upload", "/files/upload/multipart"])
def test_uploads_and_requests_count_separately(tmp_path: Path, path: str) -> None:
    one, two = ({"authorization": f"Key {key}"} for key in ("one", "two"))
    with (
        serving(tmp_path, TEST_MODELS, keys="one,two", rate_per_key="2 per day") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        statuses = [client.post(path, headers=one).status_code for _ in range(3)]
        assert client.post("/test/null", json={"prompt": "x"}, headers=one).status_code == 200
        assert client.post(path, headers=two).status_code == 200
    assert statuses == [200, 200, 429]


def test_one_key_at_a_time(tmp_path: Path, gate: Gate) -> None:
    """Run a real worker: a request over its key's limit waits for its turn, and requests of other keys overtake it."""
    one, two = ({"authorization": f"Key {key}"} for key in ("one", "two"))
    with (
        serving(tmp_path / "data", TEST_MODELS, keys="one,two", max_running_per_key="1", max_running="4") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False, headers=one) as client,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False, headers=two) as other_client,
    ):
        first = client.post("/queue/test/gate", json={"prompt": str(gate.path)}).json()
        wait_until_claimed(client, first["status_url"])
        second = client.post("/queue/test/null", json={"prompt": "x"}).json()
        other = other_client.post("/queue/test/null", json={"prompt": "x", "num_inference_steps": 1}).json()
        # The worker thread waits at the gate. The two keys share its steps.
        gate.release(3)
        assert wait_until_completed(other_client, other["status_url"])["status"] == "COMPLETED"
        assert client.get(second["status_url"]).json()["status"] == "IN_QUEUE"
        gate.release_all()
        for each in (first, second):
            assert wait_until_completed(client, each["status_url"])["status"] == "COMPLETED"
