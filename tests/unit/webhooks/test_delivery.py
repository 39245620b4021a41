"""Tests of webhook delivery: from database rows to a real receiver, with a manual clock."""

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
from tests.support.components import Clock, Components, claim_job, finish_job, open_components, submission, success

LOOPBACK = OutboundClient(("127.0.0.0/8", "::1/128"))


def webhooks(
    components: Components,
    outbound: OutboundClient = LOOPBACK,
    monotonic: Callable[[], float] = time.monotonic,
    copies: Callable[[str], int] = lambda request_id: 1,
) -> WebhookSender:
    """Return a webhook sender. A second call acts as a restart."""
    signer = WebhookSigner(components.database, clock=components.clock)
    signer.rotate()
    database, notifier, clock = components.database, components.notifier, components.clock
    return WebhookSender(database, notifier, outbound, signer, clock, monotonic=monotonic, copies=copies)


async def send_and_wait(sender: WebhookSender) -> float:
    """Send what is due and wait for all deliveries; return the seconds until the next one is due."""
    seconds = await sender.send_due()
    deliveries = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*deliveries)
    return seconds


def send_after_restart(components: Components, outbound: OutboundClient = LOOPBACK) -> float:
    """Call `send_and_wait` with a new sender, as after a restart; return the seconds until the next delivery is due."""
    return asyncio.run(send_and_wait(webhooks(components, outbound)))


def delivery(components: Components) -> tuple[object, ...]:
    """Return the number of attempts, the time of the next attempt, the time of delivery, and the last error."""
    (row,) = components.rows("SELECT attempt, due_at, delivered_at, error FROM deliveries")
    return row


def receiver_url(httpserver: HTTPServer, *statuses: int) -> str:
    """Return the URL of a receiver that answers with these statuses in order, then always with 200."""
    for status in statuses:
        httpserver.expect_ordered_request("/hook", method="POST").respond_with_data(status=status)
    httpserver.expect_request("/hook", method="POST").respond_with_data()
    return httpserver.url_for("/hook")


def received(httpserver: HTTPServer) -> list[Request]:
    """Return the requests that the receiver got."""
    return [request for request, _ in httpserver.log]


def test_a_result_is_delivered_in_fals_shape(components: Components, httpserver: HTTPServer) -> None:
    job = finish_job(components, webhook_url=receiver_url(httpserver))
    send_after_restart(components)
    (request,) = received(httpserver)
    assert json.loads(request.data) == {
        "request_id": job.request_id,
        "gateway_request_id": job.request_id,
        "status": "OK",
        "payload": {"seed": 7},
    }
    assert request.headers["content-type"] == "application/json"
    assert request.headers["x-fal-webhook-request-id"] == job.request_id
    assert request.headers["x-fal-webhook-timestamp"] == str(int(components.clock.now))
    assert delivery(components) == (1, None, components.clock.now, None)


def test_an_error_is_delivered_in_fals_shape(components: Components, httpserver: HTTPServer) -> None:
    job = claim_job(components, webhook_url=receiver_url(httpserver))
    components.queue.finish(job, Outcome.from_error(StartTimeout()))
    send_after_restart(components)
    (request,) = received(httpserver)
    assert json.loads(request.data) == {
        "request_id": job.request_id,
        "gateway_request_id": job.request_id,
        "status": "ERROR",
        "error": "Invalid status code: 504",
        "payload": json.loads(components.queue.result(job).body),
    }


@pytest.mark.parametrize("statuses", [(200, 500), (500, 200)])
def test_one_accepted_copy_is_enough(components: Components, httpserver: HTTPServer, statuses: tuple[int, int]) -> None:
    finish_job(components, webhook_url=receiver_url(httpserver, *statuses))
    asyncio.run(send_and_wait(webhooks(components, copies=lambda request_id: 2)))
    assert len(received(httpserver)) == 2
    assert delivery(components) == (1, None, components.clock.now, None)


def test_only_the_first_attempt_is_sent_more_than_once(components: Components, httpserver: HTTPServer) -> None:
    finish_job(components, webhook_url=receiver_url(httpserver, 500, 500))
    sender = webhooks(components, copies=lambda request_id: 2)
    asyncio.run(send_and_wait(sender))
    components.clock.now += DELAYS[0]
    asyncio.run(send_and_wait(sender))
    assert len(received(httpserver)) == 3


def test_no_more_copies_are_sent_after_a_reset(components: Components, httpserver: HTTPServer) -> None:
    """Check copies whose number falls to one while the first is sent."""
    finish_job(components, webhook_url=receiver_url(httpserver))
    asyncio.run(send_and_wait(webhooks(components, copies=lambda request_id: 1 if received(httpserver) else 10)))
    assert len(received(httpserver)) == 1


def test_a_cancelled_request_is_delivered_too(components: Components, httpserver: HTTPServer) -> None:
    components.queue.cancel(claim_job(components, webhook_url=receiver_url(httpserver)))
    send_after_restart(components)
    assert received(httpserver) == []
    job = claim_job(components, webhook_url=receiver_url(httpserver))
    components.queue.cancel(job)
    components.queue.finish(job, success())
    send_after_restart(components)
    (request,) = received(httpserver)
    assert json.loads(request.data)["error"] == "Invalid status code: 499"


def test_no_webhook_is_sent_before_the_result_can_be_fetched(components: Components, httpserver: HTTPServer) -> None:
    states_seen: list[tuple[State, int]] = []

    def respond(request: Request) -> Response:
        states_seen.append((job.state, components.queue.result(job).status))
        return Response()

    httpserver.expect_request("/hook").respond_with_handler(respond)
    job = claim_job(components, webhook_url=httpserver.url_for("/hook"))
    send_after_restart(components)
    assert received(httpserver) == []
    components.queue.finish(job, success())
    send_after_restart(components)
    assert states_seen == [(State.COMPLETED, 200)]


def test_a_delivered_webhook_is_not_delivered_again(components: Components, httpserver: HTTPServer) -> None:
    finish_job(components, webhook_url=receiver_url(httpserver))
    send_after_restart(components)
    components.clock.now += 86_400
    send_after_restart(components)
    assert len(received(httpserver)) == 1


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_2xx_is_success(components: Components, httpserver: HTTPServer, status: int) -> None:
    finish_job(components, webhook_url=receiver_url(httpserver, status))
    send_after_restart(components)
    assert delivery(components) == (1, None, components.clock.now, None)


@pytest.mark.parametrize("status", [300, 301, 302, 304, 307, 308, 400, 401, 404, 410, 429, 500, 503])
def test_any_other_status_is_retried(components: Components, httpserver: HTTPServer, status: int) -> None:
    httpserver.expect_request("/hook").respond_with_data(status=status, headers={"location": "/elsewhere"})
    finish_job(components, webhook_url=httpserver.url_for("/hook"))
    send_after_restart(components)
    assert delivery(components) == (1, components.clock.now + DELAYS[0], None, f"the receiver answered {status}")
    assert [request.path for request in received(httpserver)] == ["/hook"]


def test_the_ten_retries_are_sent_exactly_when_they_are_due(components: Components, httpserver: HTTPServer) -> None:
    job = finish_job(components, webhook_url=receiver_url(httpserver, *[500] * 11))

    async def retry() -> None:
        sender = webhooks(components)
        await send_and_wait(sender)
        for number, delay in enumerate(DELAYS, start=1):
            assert await send_and_wait(sender) == min(60, delay)
            components.clock.now += delay - 0.5
            assert await send_and_wait(sender) == 0.5
            assert len(received(httpserver)) == number
            components.clock.now += 0.5
            await send_and_wait(sender)
            assert len(received(httpserver)) == number + 1

    asyncio.run(retry())
    assert delivery(components) == (11, None, None, "the receiver answered 500")
    components.clock.now += 86_400
    send_after_restart(components)
    assert len(received(httpserver)) == 11
    assert {request.headers["x-fal-webhook-request-id"] for request in received(httpserver)} == {job.request_id}
    assert len({request.headers["x-fal-webhook-timestamp"] for request in received(httpserver)}) == 11


def test_there_are_ten_retries_within_two_hours() -> None:
    assert len(DELAYS) == 10
    assert list(DELAYS) == sorted(DELAYS)
    assert 3600 < sum(DELAYS) <= 7200


def test_a_retry_that_succeeds_is_the_last(components: Components, httpserver: HTTPServer) -> None:
    finish_job(components, webhook_url=receiver_url(httpserver, 500))
    send_after_restart(components)
    components.clock.now += DELAYS[0]
    send_after_restart(components)
    assert delivery(components) == (2, None, components.clock.now, None)


def test_due_webhooks_survive_a_restart(tmp_path: Path, httpserver: HTTPServer) -> None:
    with open_components(tmp_path) as components:
        finish_job(components, webhook_url=receiver_url(httpserver, 500))
        send_after_restart(components)
        before = components.clock.now
    with open_components(tmp_path) as components:
        components.queue.recover()
        send_after_restart(components)
        assert (components.clock.now, len(received(httpserver))) == (before, 1)
        components.clock.now += DELAYS[0]
        send_after_restart(components)
        assert delivery(components) == (2, None, components.clock.now, None)


def test_a_forbidden_receiver_gets_nothing(components: Components, httpserver: HTTPServer) -> None:
    finish_job(components, webhook_url=f"http://localhost:{httpserver.port}/hook")
    send_after_restart(components, OutboundClient())
    assert received(httpserver) == []
    attempt, due_at, _, error = delivery(components)
    assert (attempt, due_at) == (1, components.clock.now + DELAYS[0])
    assert str(error).startswith("ForbiddenURL")


def test_a_receiver_that_refuses_connections_is_retried(components: Components) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        finish_job(components, webhook_url=f"http://127.0.0.1:{unused.getsockname()[1]}/hook")
        send_after_restart(components)
    attempt, due_at, _, error = delivery(components)
    assert (attempt, due_at) == (1, components.clock.now + DELAYS[0])
    assert str(error).startswith("ConnectError")


@contextmanager
def raw_receiver(response: bytes | None) -> Iterator[str]:
    """Accept one connection and send these bytes, or just close it if `response` is None; yield the URL."""

    def serve() -> None:
        accepted, _ = listener.accept()
        with accepted, suppress(OSError):
            accepted.recv(65_536)
            if response is not None:
                accepted.sendall(response)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve)
        server.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/hook"
        server.join()


@pytest.mark.parametrize("response", [None, b"", b"hello\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nX"])
def test_an_invalid_response_is_retried(components: Components, response: bytes | None) -> None:
    with raw_receiver(response) as url:
        finish_job(components, webhook_url=url)
        send_after_restart(components)
    assert delivery(components)[:3] == (1, components.clock.now + DELAYS[0], None)


def test_a_receiver_that_never_answers_is_retried(components: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.webhooks.delivery.TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        finish_job(components, webhook_url=f"http://127.0.0.1:{silent.getsockname()[1]}/hook")
        send_after_restart(components)
    attempt, due_at, _, error = delivery(components)
    assert (attempt, due_at) == (1, components.clock.now + DELAYS[0])
    assert "no response" in str(error)


def test_many_webhooks_are_delivered_once_each(components: Components, httpserver: HTTPServer) -> None:
    url = receiver_url(httpserver)
    jobs = [finish_job(components, webhook_url=url).request_id for _ in range(70)]

    async def deliver() -> None:
        sender = webhooks(components)
        while components.rows("SELECT * FROM deliveries WHERE due_at IS NOT NULL"):
            await send_and_wait(sender)

    asyncio.run(deliver())
    assert sorted(json.loads(request.data)["request_id"] for request in received(httpserver)) == sorted(jobs)


@contextmanager
def silent_receivers(number: int) -> Iterator[list[str]]:
    """Yield the URLs of `number` receivers that accept every connection and never answer."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=100)) for _ in range(number)]
        yield [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]


def submit_cancelled(components: Components, owner: str, *urls: str) -> set[str]:
    """Submit and cancel a request for each of these webhook URLs; return the request ids."""
    jobs = [components.queue.submit(submission(webhook_url=url, owner=owner)) for url in urls]
    for job in jobs:
        components.queue.cancel(job)
    return {job.request_id for job in jobs}


async def send_until_delivered(components: Components, sender: WebhookSender, request_ids: set[str]) -> None:
    """Send what is due until these webhooks are delivered, while other deliveries hang."""
    components.notifier.bind_loop(asyncio.get_running_loop())
    with components.notifier.subscribe(WEBHOOKS) as event:
        while True:
            event.clear()
            await sender.send_due()
            rows = components.rows("SELECT request_id FROM deliveries WHERE delivered_at IS NOT NULL")
            if request_ids <= {request_id for (request_id,) in rows}:
                return
            async with asyncio.timeout(10):
                await event.wait()


async def num_running(sender: WebhookSender) -> int:
    """Send what is due; return how many deliveries are running."""
    await sender.send_due()
    # Connecting starts further tasks, which do not count.
    return sum("_deliver" in str(task.get_coro()) for task in asyncio.all_tasks())


async def cancel_deliveries() -> None:
    """Cancel all deliveries to receivers that never answer."""
    deliveries = asyncio.all_tasks() - {asyncio.current_task()}
    for task in deliveries:
        task.cancel()
    await asyncio.wait(deliveries)


def test_a_receiver_that_never_answers_delays_no_other_webhook(
    components: Components, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent receiver delays no other receiver of its owner and no other owner, though its webhooks are due first."""
    monkeypatch.setattr("server.webhooks.delivery.TIMEOUT", 600.0)

    async def deliver(silent: str) -> None:
        submit_cancelled(components, "bad", *(f"{silent}/{number}" for number in range(60)))
        submit_cancelled(components, "bad", *(f"{silent}?number={number}" for number in range(60)))
        sender = webhooks(components)
        assert await num_running(sender) == PER_RECEIVER
        components.clock.now += 1
        good = [url] * 20
        await send_until_delivered(
            components, sender, submit_cancelled(components, "bad", *good) | submit_cancelled(components, "good", *good)
        )
        await cancel_deliveries()

    url = receiver_url(httpserver)
    with silent_receivers(1) as (silent,):
        asyncio.run(deliver(silent))


def test_many_silent_receivers_of_one_owner_delay_no_other_owner(
    components: Components, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner gets at most half of the free slots. Some stay free for other owners, even with several bad owners."""
    monkeypatch.setattr("server.webhooks.delivery.TIMEOUT", 600.0)

    async def deliver(silent: list[str]) -> None:
        sender, total = webhooks(components), 0
        for owner, limit in (("bad", CONCURRENCY // 2), ("worse", CONCURRENCY // 4), ("worst", CONCURRENCY // 8)):
            submit_cancelled(components, owner, *(f"{url}/hook" for url in silent for _ in range(20)))
            total += limit
            assert await num_running(sender) == total
            components.clock.now += 1
        await send_until_delivered(components, sender, submit_cancelled(components, "good", *[url] * 20))
        await cancel_deliveries()

    url = receiver_url(httpserver)
    with silent_receivers(CONCURRENCY // PER_RECEIVER) as silent:
        asyncio.run(deliver(silent))


def test_a_slow_pass_is_followed_by_a_longer_pause(components: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass reads all deliveries that wait for a bad receiver. The pause leaves the database to other work."""
    monotonic = Clock()
    pauses: list[float] = []

    async def send_slowly(_: WebhookSender) -> float:
        monotonic.now += (0.25, 60.0)[len(pauses)]
        return 0.0

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise asyncio.CancelledError

    monkeypatch.setattr(WebhookSender, "send_due", send_slowly)
    monkeypatch.setattr("server.webhooks.delivery.asyncio.sleep", pause)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(webhooks(components, monotonic=monotonic).run())
    assert pauses == [1.0, 5.0]


def test_a_running_delivery_is_not_started_again(components: Components, httpserver: HTTPServer) -> None:
    may_answer = threading.Event()

    def wait(request: Request) -> Response:
        may_answer.wait(60)
        return Response()

    httpserver.expect_request("/hook").respond_with_handler(wait)
    finish_job(components, webhook_url=httpserver.url_for("/hook"))

    async def deliver() -> None:
        sender = webhooks(components)
        await sender.send_due()
        await sender.send_due()
        may_answer.set()
        await send_and_wait(sender)

    asyncio.run(deliver())
    assert len(received(httpserver)) == 1


def test_a_receiver_is_not_called_again_at_once_when_its_answer_cannot_be_recorded(
    components: Components, httpserver: HTTPServer
) -> None:
    finish_job(components, webhook_url=receiver_url(httpserver))

    async def deliver() -> None:
        sender = webhooks(components)
        components.rows("PRAGMA query_only = ON")
        for _ in range(3):
            await send_and_wait(sender)
        components.rows("PRAGMA query_only = OFF")

    asyncio.run(deliver())
    assert len(received(httpserver)) == 1
    assert delivery(components)[1] is not None


@pytest.mark.parametrize("status", [500, 200])
def test_a_redelivery_requested_during_the_last_attempt_is_sent(
    components: Components, httpserver: HTTPServer, status: int
) -> None:
    """The operator acts during the last attempt, after which no further attempt would follow in either case."""

    def send_again(request: Request) -> Response:
        Control(components.database, components.data_dir).redeliver(job.request_id)
        return Response(status=status)

    httpserver.expect_ordered_request("/hook").respond_with_handler(send_again)
    job = finish_job(components, webhook_url=receiver_url(httpserver))
    with components.database.transaction() as connection:
        connection.execute("UPDATE deliveries SET attempt = ?", (len(DELAYS),))
    send_after_restart(components)
    attempt, due_at, delivered_at, error = delivery(components)
    assert (attempt, delivered_at, error) == (0, None, None)
    assert isinstance(due_at, float)
    components.clock.now = due_at
    send_after_restart(components)
    assert delivery(components) == (1, None, components.clock.now, None)
    assert len(received(httpserver)) == 2


@pytest.mark.parametrize("seconds_back", [2 * 3600.0, 366 * 86_400.0])
def test_deliveries_scheduled_too_far_ahead_by_a_wrong_clock_are_due_now(
    components: Components, httpserver: HTTPServer, seconds_back: float
) -> None:
    """A first attempt and a retry were scheduled by a clock that was too far ahead."""
    first = finish_job(components, webhook_url=receiver_url(httpserver, 500))
    send_after_restart(components)
    second = finish_job(components, webhook_url=httpserver.url_for("/hook"))
    components.clock.now -= seconds_back
    send_after_restart(components)
    delivered_ids = [request.json["request_id"] for request in received(httpserver)]
    assert sorted(delivered_ids) == sorted([first.request_id, first.request_id, second.request_id])
    assert components.rows("SELECT count(*) FROM deliveries WHERE due_at IS NULL") == [(2,)]


def test_a_retry_is_not_sent_early_when_the_clock_is_set_back_a_little(
    components: Components, httpserver: HTTPServer
) -> None:
    finish_job(components, webhook_url=receiver_url(httpserver, 500))
    with components.database.transaction() as connection:
        connection.execute("UPDATE deliveries SET attempt = ?", (len(DELAYS) - 1,))
    send_after_restart(components)
    components.clock.now -= 1
    assert send_after_restart(components) == 60
    assert len(received(httpserver)) == 1


def test_an_unrecorded_delivery_is_retried_a_minute_later_despite_clock_jumps(
    components: Components, httpserver: HTTPServer
) -> None:
    finish_job(components, webhook_url=receiver_url(httpserver))
    monotonic = Clock(5.0)

    async def deliver() -> None:
        sender = webhooks(components, monotonic=monotonic)
        components.rows("PRAGMA query_only = ON")
        await send_and_wait(sender)
        components.rows("PRAGMA query_only = OFF")
        for jump in (86_400.0, -86_400.0):
            components.clock.now += jump
            monotonic.now += 29
            await send_and_wait(sender)
        assert len(received(httpserver)) == 1
        monotonic.now += 3
        await send_and_wait(sender)

    asyncio.run(deliver())
    assert len(received(httpserver)) == 2
    assert delivery(components) == (1, None, components.clock.now, None)


def test_the_loop_delivers_a_new_result_and_ends_when_cancelled(components: Components, httpserver: HTTPServer) -> None:
    job = claim_job(components, webhook_url=receiver_url(httpserver))

    async def deliver() -> None:
        components.notifier.bind_loop(asyncio.get_running_loop())
        running = asyncio.create_task(webhooks(components).run())
        with components.notifier.subscribe("webhooks") as event:
            await asyncio.to_thread(components.queue.finish, job, success())
            while delivery(components)[2] is None:
                await event.wait()
                event.clear()
        # The event of the loop is set too. The cancellation must end the loop nevertheless.
        running.cancel()
        ended, _ = await asyncio.wait({running}, timeout=10)
        assert ended

    asyncio.run(deliver())
    assert len(received(httpserver)) == 1


def test_deleting_a_job_deletes_its_webhook(components: Components, httpserver: HTTPServer) -> None:
    delete_job(components, finish_job(components, webhook_url=receiver_url(httpserver)))
    send_after_restart(components)
    assert received(httpserver) == []


def delete_job(components: Components, job: Job) -> None:
    """Delete a job as retention does."""
    with components.database.transaction() as connection:
        connection.execute("DELETE FROM jobs WHERE request_id = ?", (job.request_id,))
    components.queue.evict([job.request_id])
