"""Webhooks: from rows to a real receiver, on a clock that is set by hand."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from server.cli.control import Control
from server.errors import StartTimeout
from server.net.outbound import OutboundClient
from server.queue.jobs import Job, Outcome, State
from server.queue.notifier import WEBHOOKS
from server.webhooks.delivery import CONCURRENCY, DELAYS, PER_RECEIVER, WebhookSender
from server.webhooks.signing import WebhookSigner
from tests.support.components import Clock, Parts, claimed, finished, opened, painted, submission

LOOPBACK = OutboundClient(("127.0.0.0/8", "::1/128"))


def webhooks(
    parts: Parts, guard: OutboundClient = LOOPBACK, monotonic: Callable[[], float] = time.monotonic
) -> WebhookSender:
    """What delivers; a second one is what a restart makes."""
    signer = WebhookSigner(parts.database, clock=parts.clock)
    signer.rotate()
    return WebhookSender(parts.database, parts.notifier, guard, signer, parts.clock, monotonic=monotonic)


async def delivered(hooks: WebhookSender) -> float:
    """One turn, and the end of all it began; returns the seconds to wait that it said."""
    seconds = await hooks.send_due()
    begun = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*begun)
    return seconds


def turn(parts: Parts, guard: OutboundClient = LOOPBACK) -> float:
    """The same, of a server that has just started."""
    return asyncio.run(delivered(webhooks(parts, guard)))


def delivery(parts: Parts) -> tuple[object, ...]:
    """Attempts, when the next is due, when it was delivered, and the last error."""
    (row,) = parts.rows("SELECT attempt, due_at, delivered_at, error FROM deliveries")
    return row


def hook(httpserver: HTTPServer, *statuses: int) -> str:
    """A receiver that answers these one after the other, and 200 from then on."""
    for status in statuses:
        httpserver.expect_ordered_request("/hook", method="POST").respond_with_data(status=status)
    httpserver.expect_request("/hook", method="POST").respond_with_data()
    return httpserver.url_for("/hook")


def received(httpserver: HTTPServer) -> list[Request]:
    """What the receiver got."""
    return [request for request, _ in httpserver.log]


def test_a_result_is_delivered_in_fals_shape(parts: Parts, httpserver: HTTPServer) -> None:
    job = finished(parts, webhook_url=hook(httpserver))
    turn(parts)
    (request,) = received(httpserver)
    assert json.loads(request.data) == {
        "request_id": job.request_id,
        "gateway_request_id": job.request_id,
        "status": "OK",
        "payload": {"seed": 7},
    }
    assert request.headers["content-type"] == "application/json"
    assert request.headers["x-fal-webhook-request-id"] == job.request_id
    assert request.headers["x-fal-webhook-timestamp"] == str(int(parts.clock.now))
    assert delivery(parts) == (1, None, parts.clock.now, None)


def test_an_error_is_delivered_in_fals_shape(parts: Parts, httpserver: HTTPServer) -> None:
    job = claimed(parts, webhook_url=hook(httpserver))
    parts.queue.finish(job, Outcome.from_error(StartTimeout()))
    turn(parts)
    (request,) = received(httpserver)
    assert json.loads(request.data) == {
        "request_id": job.request_id,
        "gateway_request_id": job.request_id,
        "status": "ERROR",
        "error": "Invalid status code: 504",
        "payload": json.loads(parts.queue.result(job).body),
    }


def test_a_cancelled_request_is_told_too(parts: Parts, httpserver: HTTPServer) -> None:
    parts.queue.cancel(claimed(parts, webhook_url=hook(httpserver)))
    turn(parts)
    assert received(httpserver) == []
    job = claimed(parts, webhook_url=hook(httpserver))
    parts.queue.cancel(job)
    parts.queue.finish(job, painted())
    turn(parts)
    (request,) = received(httpserver)
    assert json.loads(request.data)["error"] == "Invalid status code: 499"


def test_none_comes_before_the_result_can_be_read(parts: Parts, httpserver: HTTPServer) -> None:
    seen: list[tuple[State, int]] = []

    def look(request: Request) -> Response:
        seen.append((job.state, parts.queue.result(job).status))
        return Response()

    httpserver.expect_request("/hook").respond_with_handler(look)
    job = claimed(parts, webhook_url=httpserver.url_for("/hook"))
    turn(parts)
    assert received(httpserver) == []
    parts.queue.finish(job, painted())
    turn(parts)
    assert seen == [(State.COMPLETED, 200)]


def test_what_was_delivered_is_not_delivered_again(parts: Parts, httpserver: HTTPServer) -> None:
    finished(parts, webhook_url=hook(httpserver))
    turn(parts)
    parts.clock.now += 86_400
    turn(parts)
    assert len(received(httpserver)) == 1


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_2xx_is_success(parts: Parts, httpserver: HTTPServer, status: int) -> None:
    finished(parts, webhook_url=hook(httpserver, status))
    turn(parts)
    assert delivery(parts) == (1, None, parts.clock.now, None)


@pytest.mark.parametrize("status", [300, 301, 302, 304, 307, 308, 400, 401, 404, 410, 429, 500, 503])
def test_anything_else_is_tried_again(parts: Parts, httpserver: HTTPServer, status: int) -> None:
    httpserver.expect_request("/hook").respond_with_data(status=status, headers={"location": "/elsewhere"})
    finished(parts, webhook_url=httpserver.url_for("/hook"))
    turn(parts)
    assert delivery(parts) == (1, parts.clock.now + DELAYS[0], None, f"answered {status}")
    assert [request.path for request in received(httpserver)] == ["/hook"]


def test_retries_come_exactly_when_they_are_due_and_ten_times(parts: Parts, httpserver: HTTPServer) -> None:
    job = finished(parts, webhook_url=hook(httpserver, *[500] * 11))

    async def retry() -> None:
        hooks = webhooks(parts)
        await delivered(hooks)
        for number, delay in enumerate(DELAYS, start=1):
            assert await delivered(hooks) == min(60, delay)
            parts.clock.now += delay - 0.5
            assert await delivered(hooks) == 0.5
            assert len(received(httpserver)) == number
            parts.clock.now += 0.5
            await delivered(hooks)
            assert len(received(httpserver)) == number + 1

    asyncio.run(retry())
    assert delivery(parts) == (11, None, None, "answered 500")
    parts.clock.now += 86_400
    turn(parts)
    assert len(received(httpserver)) == 11
    assert {request.headers["x-fal-webhook-request-id"] for request in received(httpserver)} == {job.request_id}
    assert len({request.headers["x-fal-webhook-timestamp"] for request in received(httpserver)}) == 11


def test_there_are_ten_retries_within_two_hours() -> None:
    assert len(DELAYS) == 10
    assert list(DELAYS) == sorted(DELAYS)
    assert 3600 < sum(DELAYS) <= 7200


def test_a_retry_that_succeeds_is_the_last(parts: Parts, httpserver: HTTPServer) -> None:
    finished(parts, webhook_url=hook(httpserver, 500))
    turn(parts)
    parts.clock.now += DELAYS[0]
    turn(parts)
    assert delivery(parts) == (2, None, parts.clock.now, None)


def test_what_is_due_survives_a_restart(tmp_path: Path, httpserver: HTTPServer) -> None:
    with opened(tmp_path) as parts:
        finished(parts, webhook_url=hook(httpserver, 500))
        turn(parts)
        before = parts.clock.now
    with opened(tmp_path) as parts:
        parts.queue.recover()
        turn(parts)
        assert (parts.clock.now, len(received(httpserver))) == (before, 1)
        parts.clock.now += DELAYS[0]
        turn(parts)
        assert delivery(parts) == (2, None, parts.clock.now, None)


def test_a_forbidden_receiver_gets_nothing(parts: Parts, httpserver: HTTPServer) -> None:
    finished(parts, webhook_url=f"http://localhost:{httpserver.port}/hook")
    turn(parts, OutboundClient())
    assert received(httpserver) == []
    attempt, due_at, _, error = delivery(parts)
    assert (attempt, due_at) == (1, parts.clock.now + DELAYS[0])
    assert str(error).startswith("ForbiddenURL")


def test_a_receiver_that_is_not_there_is_tried_again(parts: Parts) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        finished(parts, webhook_url=f"http://127.0.0.1:{taken.getsockname()[1]}/hook")
        turn(parts)
    attempt, due_at, _, error = delivery(parts)
    assert (attempt, due_at) == (1, parts.clock.now + DELAYS[0])
    assert str(error).startswith("ConnectError")


@contextmanager
def rude_receiver(answer: bytes | None) -> Iterator[str]:
    """Accepts one connection and sends this, or closes without a word."""

    def serve() -> None:
        accepted, _ = listener.accept()
        with accepted, suppress(OSError):
            accepted.recv(65_536)
            if answer is not None:
                accepted.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve)
        server.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/hook"
        server.join()


@pytest.mark.parametrize("answer", [None, b"", b"hello\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nX"])
def test_an_answer_that_is_none_is_tried_again(parts: Parts, answer: bytes | None) -> None:
    with rude_receiver(answer) as url:
        finished(parts, webhook_url=url)
        turn(parts)
    assert delivery(parts)[:3] == (1, parts.clock.now + DELAYS[0], None)


def test_a_receiver_that_never_answers_is_tried_again(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.webhooks.delivery.TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        finished(parts, webhook_url=f"http://127.0.0.1:{silent.getsockname()[1]}/hook")
        turn(parts)
    attempt, due_at, _, error = delivery(parts)
    assert (attempt, due_at) == (1, parts.clock.now + DELAYS[0])
    assert "no response" in str(error)


def test_many_are_delivered_at_once_and_each_once(parts: Parts, httpserver: HTTPServer) -> None:
    url = hook(httpserver)
    jobs = [finished(parts, webhook_url=url).request_id for _ in range(70)]

    async def deliver() -> None:
        hooks = webhooks(parts)
        while parts.rows("SELECT * FROM deliveries WHERE due_at IS NOT NULL"):
            await delivered(hooks)

    asyncio.run(deliver())
    assert sorted(json.loads(request.data)["request_id"] for request in received(httpserver)) == sorted(jobs)


@contextmanager
def silent_receivers(number: int) -> Iterator[list[str]]:
    """The addresses of so many that take every connection and never answer."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=100)) for _ in range(number)]
        yield [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]


def cancelled(parts: Parts, owner: str, *urls: str) -> set[str]:
    """The ids of requests that were ended at once, each with a webhook due at one of these."""
    jobs = [parts.queue.submit(submission(webhook_url=url, owner=owner)) for url in urls]
    for job in jobs:
        parts.queue.cancel(job)
    return {job.request_id for job in jobs}


async def told(parts: Parts, hooks: WebhookSender, hoped_for: set[str]) -> None:
    """Turns until these were delivered, while others are under way."""
    parts.notifier.bind_loop(asyncio.get_running_loop())
    with parts.notifier.subscribe(WEBHOOKS) as bell:
        while True:
            bell.clear()
            await hooks.send_due()
            done = parts.rows("SELECT request_id FROM deliveries WHERE delivered_at IS NOT NULL")
            if hoped_for <= {name for (name,) in done}:
                return
            async with asyncio.timeout(10):
                await bell.wait()


async def begun(hooks: WebhookSender) -> int:
    """How many deliveries are under way after a turn."""
    await hooks.send_due()
    # Connecting makes tasks of its own.
    return sum("_deliver" in str(task.get_coro()) for task in asyncio.all_tasks())


async def abandoned() -> None:
    """End what these receivers never will."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.wait(others)


def test_a_receiver_that_never_answers_holds_up_nobody_else(
    parts: Parts, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither other receivers of the same owner nor other owners, though all of its webhooks were due before."""
    monkeypatch.setattr("server.webhooks.delivery.TIMEOUT", 600.0)

    async def deliver(silent: str) -> None:
        cancelled(parts, "bad", *(f"{silent}/{number}" for number in range(60)))
        cancelled(parts, "bad", *(f"{silent}?number={number}" for number in range(60)))
        hooks = webhooks(parts)
        assert await begun(hooks) == PER_RECEIVER
        parts.clock.now += 1
        good = [url] * 20
        await told(parts, hooks, cancelled(parts, "bad", *good) | cancelled(parts, "good", *good))
        await abandoned()

    url = hook(httpserver)
    with silent_receivers(1) as (silent,):
        asyncio.run(deliver(silent))


def test_many_receivers_of_one_owner_hold_up_no_other_owner(
    parts: Parts, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has half of what the others leave: there is some for the next, also when several of them are bad."""
    monkeypatch.setattr("server.webhooks.delivery.TIMEOUT", 600.0)

    async def deliver(silent: list[str]) -> None:
        hooks, under_way = webhooks(parts), 0
        for owner, most in (("bad", CONCURRENCY // 2), ("worse", CONCURRENCY // 4), ("worst", CONCURRENCY // 8)):
            cancelled(parts, owner, *(f"{url}/hook" for url in silent for _ in range(20)))
            under_way += most
            assert await begun(hooks) == under_way
            parts.clock.now += 1
        await told(parts, hooks, cancelled(parts, "good", *[url] * 20))
        await abandoned()

    url = hook(httpserver)
    with silent_receivers(CONCURRENCY // PER_RECEIVER) as silent:
        asyncio.run(deliver(silent))


def test_a_turn_that_reads_for_long_is_followed_by_a_longer_rest(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands that wait behind a bad receiver are read through each time: others need the database too."""
    monotonic = Clock()
    rests: list[float] = []

    async def turn(_: WebhookSender) -> float:
        monotonic.now += (0.25, 60.0)[len(rests)]
        return 0.0

    async def rest(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 2:
            raise asyncio.CancelledError

    monkeypatch.setattr(WebhookSender, "send_due", turn)
    monkeypatch.setattr("server.webhooks.delivery.asyncio.sleep", rest)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(webhooks(parts, monotonic=monotonic).run())
    assert rests == [1.0, 5.0]


def test_one_under_way_is_not_begun_twice(parts: Parts, httpserver: HTTPServer) -> None:
    may_answer = threading.Event()

    def wait(request: Request) -> Response:
        may_answer.wait(60)
        return Response()

    httpserver.expect_request("/hook").respond_with_handler(wait)
    finished(parts, webhook_url=httpserver.url_for("/hook"))

    async def deliver() -> None:
        hooks = webhooks(parts)
        await hooks.send_due()
        await hooks.send_due()
        may_answer.set()
        await delivered(hooks)

    asyncio.run(deliver())
    assert len(received(httpserver)) == 1


def test_a_receiver_is_left_in_peace_when_its_answer_cannot_be_recorded(parts: Parts, httpserver: HTTPServer) -> None:
    finished(parts, webhook_url=hook(httpserver))

    async def deliver() -> None:
        hooks = webhooks(parts)
        parts.rows("PRAGMA query_only = ON")
        for _ in range(3):
            await delivered(hooks)
        parts.rows("PRAGMA query_only = OFF")

    asyncio.run(deliver())
    assert len(received(httpserver)) == 1
    assert delivery(parts)[1] is not None


@pytest.mark.parametrize("status", [500, 200])
def test_what_the_operator_sends_again_meanwhile_is_sent_again(
    parts: Parts, httpserver: HTTPServer, status: int
) -> None:
    """During the last attempt, which would be the end of it either way."""

    def send_again(request: Request) -> Response:
        Control(parts.database, parts.folder).redeliver(job.request_id)
        return Response(status=status)

    httpserver.expect_ordered_request("/hook").respond_with_handler(send_again)
    job = finished(parts, webhook_url=hook(httpserver))
    with parts.database.transaction() as connection:
        connection.execute("UPDATE deliveries SET attempt = ?", (len(DELAYS),))
    turn(parts)
    attempt, due_at, delivered_at, error = delivery(parts)
    assert (attempt, delivered_at, error) == (0, None, None)
    assert isinstance(due_at, float)
    parts.clock.now = due_at
    turn(parts)
    assert delivery(parts) == (1, None, parts.clock.now, None)
    assert len(received(httpserver)) == 2


@pytest.mark.parametrize("back", [2 * 3600.0, 366 * 86_400.0])
def test_what_a_wrong_clock_put_far_ahead_is_due(parts: Parts, httpserver: HTTPServer, back: float) -> None:
    """The first attempt, and a retry."""
    first = finished(parts, webhook_url=hook(httpserver, 500))
    turn(parts)
    second = finished(parts, webhook_url=httpserver.url_for("/hook"))
    parts.clock.now -= back
    turn(parts)
    told = [request.json["request_id"] for request in received(httpserver)]
    assert sorted(told) == sorted([first.request_id, first.request_id, second.request_id])
    assert parts.rows("SELECT count(*) FROM deliveries WHERE due_at IS NULL") == [(2,)]


def test_a_retry_does_not_come_early_because_a_clock_is_set_back_a_little(parts: Parts, httpserver: HTTPServer) -> None:
    finished(parts, webhook_url=hook(httpserver, 500))
    with parts.database.transaction() as connection:
        connection.execute("UPDATE deliveries SET attempt = ?", (len(DELAYS) - 1,))
    turn(parts)
    parts.clock.now -= 1
    assert turn(parts) == 60
    assert len(received(httpserver)) == 1


def test_what_was_put_off_comes_a_minute_later_by_any_clock(parts: Parts, httpserver: HTTPServer) -> None:
    finished(parts, webhook_url=hook(httpserver))
    monotonic = Clock(5.0)

    async def deliver() -> None:
        hooks = webhooks(parts, monotonic=monotonic)
        parts.rows("PRAGMA query_only = ON")
        await delivered(hooks)
        parts.rows("PRAGMA query_only = OFF")
        for jump in (86_400.0, -86_400.0):
            parts.clock.now += jump
            monotonic.now += 29
            await delivered(hooks)
        assert len(received(httpserver)) == 1
        monotonic.now += 3
        await delivered(hooks)

    asyncio.run(deliver())
    assert len(received(httpserver)) == 2
    assert delivery(parts) == (1, None, parts.clock.now, None)


def test_the_loop_hears_of_a_result_and_ends_when_it_is_told_to(parts: Parts, httpserver: HTTPServer) -> None:
    job = claimed(parts, webhook_url=hook(httpserver))

    async def deliver() -> None:
        parts.notifier.bind_loop(asyncio.get_running_loop())
        running = asyncio.create_task(webhooks(parts).run())
        with parts.notifier.subscribe("webhooks") as bell:
            await asyncio.to_thread(parts.queue.finish, job, painted())
            while delivery(parts)[2] is None:
                await bell.wait()
                bell.clear()
        # The bell has just rung for the loop too: it must not take that for a reason to go on.
        running.cancel()
        done, _ = await asyncio.wait({running}, timeout=10)
        assert done

    asyncio.run(deliver())
    assert len(received(httpserver)) == 1


def test_a_forgotten_job_takes_its_webhook_along(parts: Parts, httpserver: HTTPServer) -> None:
    forget(parts, finished(parts, webhook_url=hook(httpserver)))
    turn(parts)
    assert received(httpserver) == []


def forget(parts: Parts, job: Job) -> None:
    """As retention does."""
    with parts.database.transaction() as connection:
        connection.execute("DELETE FROM jobs WHERE request_id = ?", (job.request_id,))
    parts.queue.evict([job.request_id])
