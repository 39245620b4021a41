"""Tests of the queue API over a real socket."""

import json

import httpx
import pytest

from tests.support.server_process import Gate, wait_until_claimed, wait_until_completed


def test_submit_status_result(client: httpx.Client) -> None:
    reply = client.post("/queue/test/null", json={"prompt": "x", "seed": 7}).json()
    assert reply["status"] == "IN_QUEUE"
    done = wait_until_completed(client, reply["status_url"])
    assert done["status"] == "COMPLETED"
    result = client.get(reply["response_url"])
    assert result.status_code == 200
    assert result.json()["seed"] == 7
    assert result.headers["x-fal-request-id"] == reply["request_id"]


def test_a_request_and_its_image_can_be_deleted(client: httpx.Client, gate: Gate) -> None:
    body = {"prompt": str(gate.path), "num_inference_steps": 1}
    reply = client.post("/queue/test/gate", json=body).json()
    wait_until_claimed(client, reply["status_url"])
    assert client.delete(reply["response_url"]).status_code == 400
    gate.release_all()
    wait_until_completed(client, reply["status_url"])
    (image,) = client.get(reply["response_url"]).json()["images"]
    assert client.get(image["url"]).status_code == 200
    assert client.delete(reply["response_url"]).status_code == 204
    assert client.get(image["url"]).status_code == 404
    assert client.get(reply["status_url"]).status_code == client.get(reply["response_url"]).status_code == 404
    assert client.delete(reply["response_url"]).status_code == 404


@pytest.mark.parametrize("endpoint", ["fal-ai/flux-lora", "fal-ai/flux-krea-lora"])
def test_a_stream_route_is_queued_as_its_endpoint_and_streams_when_called(client: httpx.Client, endpoint: str) -> None:
    """fal lists these stream routes as endpoints, so its clients submit to them and stream from them."""
    size = {"width": 64, "height": 64}
    body = {"prompt": "a fish", "image_size": size, "num_inference_steps": 1, "seed": 7, "sync_mode": True}
    events = client.post(f"/{endpoint}/stream", json=body)
    assert events.headers["content-type"].startswith("text/event-stream")
    streamed = json.loads(events.text.strip().splitlines()[-1].removeprefix("data: "))
    reply = client.post(f"/queue/{endpoint}/stream", json=body).json()
    done = wait_until_completed(client, reply["status_url"])
    assert f"/{endpoint}/requests/" in done["response_url"]
    queued = client.get(f"/queue/{endpoint}/stream/requests/{reply['request_id']}").json()
    assert queued["images"] == streamed["images"] == client.post(f"/{endpoint}", json=body).json()["images"]
    assert client.get(f"/models/{endpoint}/stream/llms.txt").text.startswith(f"# {endpoint}\n")


def test_a_stream_route_of_an_unknown_endpoint_is_unknown(client: httpx.Client) -> None:
    answer = client.post("/queue/fal-ai/unknown/stream", json={"prompt": "x"})
    assert answer.status_code == 404
    assert "fal-ai/unknown" in answer.json()["detail"]
