"""Tests of usage: fal's billable units, and the number of successful requests by key and day."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.components import Clock, Components, claim_job, finish_job, open_components, success


@pytest.fixture
def components(tmp_path: Path) -> Iterator[Components]:
    with open_components(tmp_path, clock=Clock()) as opened_parts:
        yield opened_parts


@pytest.mark.parametrize(
    ("size", "number", "units"),
    [((1000, 1000), 1, 1), ((1024, 768), 4, 4), ((1024, 1024), 1, 2), ((2048, 2048), 2, 10), ((64, 64), 3, 3)],
)
def test_billable_units_are_the_megapixels_of_each_image_rounded_up(
    client: httpx.Client, size: tuple[int, int], number: int, units: int
) -> None:
    image_size = {"width": size[0], "height": size[1]}
    body = {"prompt": "x", "image_size": image_size, "num_images": number, "num_inference_steps": 1}
    response = client.post("/test/null", json=body)
    assert response.headers["x-fal-billable-units"] == str(units)
    submitted = client.post("/queue/test/null", json=body).json()
    with client.stream("GET", f"{submitted['status_url']}/stream") as status:
        status.read()
    assert client.get(submitted["response_url"]).headers["x-fal-billable-units"] == str(units)


@pytest.mark.parametrize("body", [{"prompt": 5}, {"prompt": "x", "num_images": 9}])
def test_refused_and_failed_requests_cost_nothing(client: httpx.Client, body: dict[str, Any]) -> None:
    assert client.post("/test/null", json=body).headers["x-fal-billable-units"] == "0"
    assert client.post("/test/raises", json={"prompt": "x"}).headers["x-fal-billable-units"] == "0"


def test_usage_by_key_and_day_counts_only_successful_requests(components: Components) -> None:
    for owner, days in (("me", 0), ("me", 0), ("you", 0), ("me", 1)):
        components.clock.now += 86_400 * days
        finish_job(components, owner=owner)
    cancelled = claim_job(components, owner="me")
    components.queue.cancel(cancelled)
    components.queue.finish(cancelled, success())
    found = components.rows("SELECT owner, day, requests FROM usage ORDER BY owner, day")
    assert found == [("me", "2027-01-15", 2), ("me", "2027-01-16", 1), ("you", "2027-01-15", 1)]
