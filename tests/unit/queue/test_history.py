"""Tests of the request history of a key, page by page."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.errors import InternalError
from server.queue import history
from server.queue.history import HistoryQuery
from server.queue.jobs import Outcome
from tests.support.components import Clock, Components, claim_job, finish_job, open_components, submission, success
from tests.support.server_process import TEST_MODELS, serving

PATH = "/v1/models/requests/by-endpoint"


@pytest.fixture
def components(tmp_path: Path) -> Iterator[Components]:
    with open_components(tmp_path, clock=Clock()) as opened_parts:
        yield opened_parts


def ids(page: Any) -> list[str]:
    """Return the request ids of a page, in the order of the page."""
    return [item["request_id"] for item in page["items"]]


def all_pages(components: Components, **filters: Any) -> list[list[str]]:
    """Return the request ids of every page, by following the cursors."""
    found, cursor = [], None
    while True:
        page = history.query_history(components.database, HistoryQuery(owner="me", cursor=cursor, **filters))
        found.append(ids(page))
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
        if cursor is None:
            return found


def test_pages_list_the_newest_request_first(components: Components) -> None:
    request_ids = []
    for number in range(7):
        # Pages must also separate two requests that end at the same moment.
        components.clock.now += number % 2
        request_ids.append(finish_job(components).request_id)
    newest = request_ids[::-1]
    assert all_pages(components, limit=3) == [newest[:3], newest[3:6], newest[6:]]
    assert all_pages(components, limit=7) == [newest]


def test_a_request_that_finishes_between_two_pages_shifts_nothing(components: Components) -> None:
    first, second = finish_job(components).request_id, finish_job(components).request_id
    page = history.query_history(components.database, HistoryQuery(owner="me", limit=1))
    finish_job(components)
    after = history.query_history(components.database, HistoryQuery(owner="me", limit=1, cursor=page["next_cursor"]))
    assert (ids(page), ids(after)) == ([second], [first])


def test_filters(components: Components) -> None:
    started_at = components.clock.now
    succeeded = finish_job(components).request_id
    components.clock.now += 10
    failed = claim_job(components, endpoint="test/raises")
    components.queue.finish(failed, Outcome.from_error(InternalError("It broke.")))
    components.clock.now += 10
    cancelled = components.queue.submit(submission())
    components.queue.cancel(cancelled)
    finish_job(components, owner="you")
    finish_job(components, store_io=False)
    claim_job(components)
    assert all_pages(components) == [[cancelled.request_id, failed.request_id, succeeded]]
    assert all_pages(components, status="success") == [[succeeded]]
    assert all_pages(components, status="error") == [[failed.request_id]]
    assert all_pages(components, status="user_error") == [[cancelled.request_id]]
    assert all_pages(components, endpoints=["test/raises", "test/other"]) == [[failed.request_id]]
    assert all_pages(components, request_id=succeeded) == [[succeeded]]
    assert all_pages(components, ended_from=started_at + 10, ended_before=started_at + 20) == [[failed.request_id]]


def test_the_fields_of_an_item(components: Components) -> None:
    sent = components.clock.now
    job = claim_job(components, fields={"prompt": "a cat"})
    components.clock.now += 2.5
    components.queue.finish(job, success('{"seed":7}'))
    (item,) = history.query_history(components.database, HistoryQuery(owner="me"))["items"]
    assert "json_input" not in item
    (item,) = history.query_history(components.database, HistoryQuery(owner="me", include_payloads=True))["items"]
    assert item["json_input"]["prompt"] == "a cat"
    assert item["json_input"]["seed"] == 7
    assert item["json_output"] == {"seed": 7}
    assert (item["endpoint_id"], item["status_code"], item["duration"]) == ("test/null", 200, 2.5)
    times = [datetime.fromisoformat(item[name]).timestamp() for name in ("sent_at", "started_at", "ended_at")]
    assert times == [sent, sent, sent + 2.5]


def test_an_output_with_embedded_images_is_omitted(components: Components) -> None:
    job = claim_job(components)
    components.queue.finish(job, success('{"images":["' + "x" * 100_000 + '"]}'))
    (item,) = history.query_history(components.database, HistoryQuery(owner="me", include_payloads=True))["items"]
    assert item["json_output"] is None


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "https://example.com/a.png"])
def test_data_uris_are_omitted_from_the_input_and_urls_are_kept(components: Components, url: str) -> None:
    """A URL can be fetched again. A data URI is kept only as long as the request needs it."""
    stored = "f.png" if url.startswith("data:") else url
    text = json.dumps({"prompt": "x", "image_url": stored, "loras": [{"path": stored, "scale": 1}]})
    input_files = {"image_url": "f.png", "loras.0.path": "f.png"}
    job = claim_job(components, input=text, input_files=input_files)
    components.queue.finish(job, success('{"images":[]}'))
    (item,) = history.query_history(components.database, HistoryQuery(owner="me", include_payloads=True))["items"]
    kept = {} if url.startswith("data:") else {"image_url": url}
    lora = {"scale": 1} if url.startswith("data:") else {"path": url, "scale": 1}
    assert item["json_input"] == {"prompt": "x", **kept, "loras": [lora]}


@pytest.mark.parametrize("cursor", ["x", "Mg==", "%", "é" * 8, "A" * 9_999])
def test_an_invalid_cursor_is_refused(components: Components, cursor: str) -> None:
    with pytest.raises(ValueError, match="next_cursor"):
        history.query_history(components.database, HistoryQuery(owner="me", cursor=cursor))


def test_the_query_uses_the_owner_index(components: Components) -> None:
    """Finding a page needs no scan of all rows and no sort, for any number of keys."""
    statements: list[str] = []
    components.database._connection.set_trace_callback(statements.append)
    history.query_history(components.database, HistoryQuery(owner="me", include_payloads=True))
    components.database._connection.set_trace_callback(None)
    (plan,) = [row["detail"] for row in components.database.read(f"EXPLAIN QUERY PLAN {statements[-1]}")]
    assert plan == "SEARCH jobs USING INDEX jobs_owner (owner=? AND finished_at>?)"


@pytest.fixture(scope="module")
def first_key_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Start a server with two keys and yield a client that sends the first key."""
    with (
        serving(tmp_path_factory.mktemp("keyed"), TEST_MODELS, keys="one,two") as server,
        httpx.Client(
            base_url=server.ready().url, timeout=60, trust_env=False, headers={"authorization": "Key one"}
        ) as client,
    ):
        yield client


def test_history_over_http(first_key_client: httpx.Client) -> None:
    bodies = [{"prompt": f"number {number}", "image_size": "square"} for number in range(3)]
    responses = [first_key_client.post("/test/null", json=body) for body in bodies]
    first_key_client.post("/test/null", json={"prompt": "x"}, headers={"authorization": "Key two"})
    found = first_key_client.get(PATH, params={"endpoint_id": "test/null", "expand": "payloads", "limit": 2}).json()
    assert ids(found) == [response.headers["x-fal-request-id"] for response in responses[:0:-1]]
    assert [item["json_output"] for item in found["items"]] == [response.json() for response in responses[:0:-1]]
    rest = first_key_client.get(PATH, params={"endpoint_id": "a/b,test/null", "cursor": found["next_cursor"]}).json()
    assert ids(rest) == [responses[0].headers["x-fal-request-id"]]
    assert not rest["has_more"]
    assert first_key_client.get(PATH, headers={"authorization": "Key three"}).status_code == 401


def test_start_and_end_select_a_time_range(first_key_client: httpx.Client) -> None:
    now = datetime.now(UTC)
    first_key_client.post("/test/null", json={"prompt": "x"}).raise_for_status()
    assert first_key_client.get(PATH, params={"start": now.isoformat()}).json()["items"]
    assert first_key_client.get(PATH, params={"start": now.date().isoformat()}).json()["items"]
    assert not first_key_client.get(PATH, params={"start": "1970-01-01", "end": now.date().isoformat()}).json()["items"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", "0"),
        ("limit", "101"),
        ("limit", "x"),
        ("cursor", "Mg=="),
        ("start", "yesterday"),
        ("status", "lost"),
        ("expand", "everything"),
        ("sort_by", "colour"),
        ("endpoint_id", ",".join(["a/b"] * 51)),
    ],
)
def test_a_422_names_the_invalid_parameter(first_key_client: httpx.Client, name: str, value: str) -> None:
    response = first_key_client.get(PATH, params={name: value})
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"][:2] == ["query", name]


def test_random_parameters_never_cause_a_server_error(first_key_client: httpx.Client) -> None:
    for _ in range(200):
        name = ("limit", "cursor", "start", "end", "status", "request_id", "endpoint_id")[os.urandom(1)[0] % 7]
        response = first_key_client.get(PATH, params={name: os.urandom(12).decode("latin-1")})
        assert response.status_code in (200, 422), (name, response.text)
