"""The queue over a real socket."""

import httpx

from tests.serving import completed


def test_submit_status_result(client: httpx.Client) -> None:
    reply = client.post("/queue/test/null", json={"prompt": "x", "seed": 7}).json()
    assert reply["status"] == "IN_QUEUE"
    done = completed(client, reply["status_url"])
    assert done["status"] == "COMPLETED"
    result = client.get(reply["response_url"])
    assert result.status_code == 200
    assert result.json()["seed"] == 7
    assert result.headers["x-fal-request-id"] == reply["request_id"]
