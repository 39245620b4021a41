"""What a key has asked for, page by page."""

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
from tests.support.components import Clock, Parts, claimed, finished, opened, submission
from tests.support.components import painted as well
from tests.support.server_process import TEST_MODELS, serving

PATH = "/v1/models/requests/by-endpoint"


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with opened(tmp_path, clock=Clock()) as opened_parts:
        yield opened_parts


def ids(page: Any) -> list[str]:
    """In the order of the page."""
    return [item["request_id"] for item in page["items"]]


def pages(parts: Parts, **wanted: Any) -> list[list[str]]:
    """All of them, by following the cursors."""
    found, cursor = [], None
    while True:
        page = history.query_history(parts.database, HistoryQuery(owner="me", cursor=cursor, **wanted))
        found.append(ids(page))
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
        if cursor is None:
            return found


def test_the_newest_first_page_by_page(parts: Parts) -> None:
    done = []
    for number in range(7):
        # Two that end at one moment are told apart too.
        parts.clock.now += number % 2
        done.append(finished(parts).request_id)
    newest = done[::-1]
    assert pages(parts, limit=3) == [newest[:3], newest[3:6], newest[6:]]
    assert pages(parts, limit=7) == [newest]


def test_what_ends_while_somebody_pages_moves_nothing(parts: Parts) -> None:
    first, second = finished(parts).request_id, finished(parts).request_id
    page = history.query_history(parts.database, HistoryQuery(owner="me", limit=1))
    finished(parts)
    after = history.query_history(parts.database, HistoryQuery(owner="me", limit=1, cursor=page["next_cursor"]))
    assert (ids(page), ids(after)) == ([second], [first])


def test_only_what_is_wanted(parts: Parts) -> None:
    begun = parts.clock.now
    well_done = finished(parts).request_id
    parts.clock.now += 10
    failed = claimed(parts, endpoint="test/raises")
    parts.queue.finish(failed, Outcome.from_error(InternalError("It broke.")))
    parts.clock.now += 10
    cancelled = parts.queue.submit(submission())
    parts.queue.cancel(cancelled)
    finished(parts, owner="you")
    finished(parts, store_io=False)
    claimed(parts)
    assert pages(parts) == [[cancelled.request_id, failed.request_id, well_done]]
    assert pages(parts, status="success") == [[well_done]]
    assert pages(parts, status="error") == [[failed.request_id]]
    assert pages(parts, status="user_error") == [[cancelled.request_id]]
    assert pages(parts, endpoints=["test/raises", "test/other"]) == [[failed.request_id]]
    assert pages(parts, request_id=well_done) == [[well_done]]
    assert pages(parts, ended_from=begun + 10, ended_before=begun + 20) == [[failed.request_id]]


def test_an_item(parts: Parts) -> None:
    sent = parts.clock.now
    job = claimed(parts, fields={"prompt": "a cat"})
    parts.clock.now += 2.5
    parts.queue.finish(job, well('{"seed":7}'))
    (item,) = history.query_history(parts.database, HistoryQuery(owner="me"))["items"]
    assert "json_input" not in item
    (item,) = history.query_history(parts.database, HistoryQuery(owner="me", include_payloads=True))["items"]
    assert item["json_input"]["prompt"] == "a cat"
    assert item["json_input"]["seed"] == 7
    assert item["json_output"] == {"seed": 7}
    assert (item["endpoint_id"], item["status_code"], item["duration"]) == ("test/null", 200, 2.5)
    times = [datetime.fromisoformat(item[name]).timestamp() for name in ("sent_at", "started_at", "ended_at")]
    assert times == [sent, sent, sent + 2.5]


def test_an_answer_with_pictures_in_it_is_left_out(parts: Parts) -> None:
    job = claimed(parts)
    parts.queue.finish(job, well('{"images":["' + "x" * 100_000 + '"]}'))
    (item,) = history.query_history(parts.database, HistoryQuery(owner="me", include_payloads=True))["items"]
    assert item["json_output"] is None


@pytest.mark.parametrize("given", ["data:image/png;base64,AAAA", "https://example.com/a.png"])
def test_what_came_in_the_request_itself_is_not_named(parts: Parts, given: str) -> None:
    """An address can be asked for again; a data URI is kept no longer than the request needs it."""
    stored = "f.png" if given.startswith("data:") else given
    text = json.dumps({"prompt": "x", "image_url": stored, "loras": [{"path": stored, "scale": 1}]})
    held = {"image_url": "f.png", "loras.0.path": "f.png"}
    job = claimed(parts, input=text, input_files=held)
    parts.queue.finish(job, well('{"images":[]}'))
    (item,) = history.query_history(parts.database, HistoryQuery(owner="me", include_payloads=True))["items"]
    kept = {} if given.startswith("data:") else {"image_url": given}
    lora = {"scale": 1} if given.startswith("data:") else {"path": given, "scale": 1}
    assert item["json_input"] == {"prompt": "x", **kept, "loras": [lora]}


@pytest.mark.parametrize("cursor", ["x", "Mg==", "%", "é" * 8, "A" * 9_999])
def test_a_cursor_that_is_none(parts: Parts, cursor: str) -> None:
    with pytest.raises(ValueError, match="next_cursor"):
        history.query_history(parts.database, HistoryQuery(owner="me", cursor=cursor))


def test_the_index_is_used(parts: Parts) -> None:
    """However many keys there are, a page is found without looking at all rows, and without sorting."""
    statements: list[str] = []
    parts.database._connection.set_trace_callback(statements.append)
    history.query_history(parts.database, HistoryQuery(owner="me", include_payloads=True))
    parts.database._connection.set_trace_callback(None)
    (plan,) = [row["detail"] for row in parts.database.read(f"EXPLAIN QUERY PLAN {statements[-1]}")]
    assert plan == "SEARCH jobs USING INDEX jobs_owner (owner=? AND finished_at>?)"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with two keys; the client has the first."""
    with (
        serving(tmp_path_factory.mktemp("keyed"), TEST_MODELS, keys="one,two") as server,
        httpx.Client(
            base_url=server.ready().url, timeout=60, trust_env=False, headers={"authorization": "Key one"}
        ) as client,
    ):
        yield client


def test_over_the_wire(keyed: httpx.Client) -> None:
    answers = [
        keyed.post("/test/null", json={"prompt": f"number {number}", "image_size": "square"}) for number in range(3)
    ]
    keyed.post("/test/null", json={"prompt": "x"}, headers={"authorization": "Key two"})
    found = keyed.get(PATH, params={"endpoint_id": "test/null", "expand": "payloads", "limit": 2}).json()
    assert ids(found) == [answer.headers["x-fal-request-id"] for answer in answers[:0:-1]]
    assert [item["json_output"] for item in found["items"]] == [answer.json() for answer in answers[:0:-1]]
    rest = keyed.get(PATH, params={"endpoint_id": "a/b,test/null", "cursor": found["next_cursor"]}).json()
    assert ids(rest) == [answers[0].headers["x-fal-request-id"]]
    assert not rest["has_more"]
    assert keyed.get(PATH, headers={"authorization": "Key three"}).status_code == 401


def test_a_day_back_unless_asked(keyed: httpx.Client) -> None:
    now = datetime.now(UTC)
    keyed.post("/test/null", json={"prompt": "x"}).raise_for_status()
    assert keyed.get(PATH, params={"start": now.isoformat()}).json()["items"]
    assert keyed.get(PATH, params={"start": now.date().isoformat()}).json()["items"]
    assert not keyed.get(PATH, params={"start": "1970-01-01", "end": now.date().isoformat()}).json()["items"]


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
def test_what_is_wrong_is_named(keyed: httpx.Client, name: str, value: str) -> None:
    answer = keyed.get(PATH, params={name: value})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][:2] == ["query", name]


def test_odd_parameters_break_nothing(keyed: httpx.Client) -> None:
    rng = os.urandom
    for _ in range(200):
        name = ("limit", "cursor", "start", "end", "status", "request_id", "endpoint_id")[rng(1)[0] % 7]
        answer = keyed.get(PATH, params={name: rng(12).decode("latin-1")})
        assert answer.status_code in (200, 422), (name, answer.text)
