"""Tests of the sticker shop. Each makes the server misbehave in one way, and checks that the shop copes."""

import time
from collections.abc import Callable, Iterator
from threading import Thread

import httpx
import pytest
import stickers
from flux_server_testing import FalServer
from models import Refused, TryLater
from server import web


@pytest.fixture
def webhook_url() -> Iterator[str]:
    """Run the shop's web server; yield the address for webhooks."""
    with web.open_server() as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until the condition is true."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_sticker(fal_server: FalServer) -> None:
    url = stickers.draw("a red apple")
    assert httpx.get(url).headers["content-type"] == "image/jpeg"
    (request,) = fal_server.requests
    assert request.endpoint == "fal-ai/flux/schnell"
    assert request.input["prompt"] == "a red apple"


def test_an_invalid_prompt(fal_server: FalServer) -> None:
    fal_server.fail_next(422, field="prompt")
    with pytest.raises(Refused, match="Please change: prompt"):
        stickers.draw("a red apple")


def test_an_unsafe_image(fal_server: FalServer) -> None:
    fal_server.flag_next()
    with pytest.raises(Refused, match="would not suit everyone"):
        stickers.draw("a red apple")


def test_an_error_of_the_server(fal_server: FalServer) -> None:
    fal_server.fail_next(500)
    assert stickers.draw("a red apple")
    assert len(fal_server.requests) == 2


def test_a_timeout(fal_server: FalServer) -> None:
    fal_server.time_out_next()
    with pytest.raises(TryLater, match="Too many people"):
        stickers.draw("a red apple")


def test_a_cancelled_request(fal_server: FalServer) -> None:
    fal_server.cancel_next()
    with pytest.raises(TryLater, match="stopped"):
        stickers.draw("a red apple")


def test_a_slow_sticker_is_cancelled(fal_server: FalServer) -> None:
    fal_server.delay_next(600)
    with pytest.raises(TryLater, match="too long"):
        stickers.draw_soon("a red apple", seconds=1)
    assert fal_server.requests[0].is_cancelled


def test_a_limit_is_respected(fal_server: FalServer) -> None:
    fal_server.fail_next(429, retry_after=1, times=2)
    assert stickers.draw_logo("flux")
    requests = fal_server.requests
    assert [request.refused for request in requests] == [429, 429, None]
    assert requests[2].submitted_at - requests[0].submitted_at > 2


def test_the_place_in_the_queue(fal_server: FalServer, webhook_url: str) -> None:
    hold = fal_server.hold_next(queue_position=3)
    order = stickers.order("a red apple", webhook_url)
    assert stickers.place(order) == "You are number 4"
    hold.release()
    wait_until(lambda: order.status == "done")


def test_a_webhook_that_comes_twice(fal_server: FalServer, webhook_url: str) -> None:
    fal_server.webhook_next(copies=2)
    sold = stickers.num_sold
    order = stickers.order("a red apple", webhook_url)
    wait_until(lambda: web.received.count(order.request_id) == 2)
    assert order.status == "done"
    assert stickers.num_sold == sold + 1


def test_a_webhook_that_comes_late(fal_server: FalServer, webhook_url: str) -> None:
    fal_server.webhook_next(delay=600)
    order = stickers.order("a red apple", webhook_url)
    wait_until(lambda: fal_server.requests[0].status == "COMPLETED")
    assert stickers.look_up(order.request_id).status == "done"
