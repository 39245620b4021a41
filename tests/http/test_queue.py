"""Tests of the queue API over a real socket."""

import httpx

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
