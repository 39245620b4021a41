"""Refusals for other reasons than a bad field: too many bytes, bad headers, forbidden webhooks, a full queue."""

import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.error_bodies import error_message, first_field_error
from tests.support.server_process import TEST_MODELS, Gate, Server, serving, wait_until_claimed, wait_until_completed

FLUX = "/fal-ai/flux/dev"


def test_oversize_body(constrained_client: httpx.Client) -> None:
    limit = 2**20
    body = json.dumps({"prompt": "x", "ignored": ""}).encode()
    body += b" " * (limit - len(body))
    assert constrained_client.post("/test/null", content=body).status_code == 200
    assert str(limit) in error_message(constrained_client.post("/test/null", content=body + b" "), 413)


def test_oversize_body_in_chunks(constrained_client: httpx.Client) -> None:
    chunks = (b" " * 65_536 for _ in range(17))
    assert str(2**20) in error_message(constrained_client.post("/test/null", content=chunks), 413)
    assert constrained_client.post("/test/null", json={"prompt": "x"}).status_code == 200


def test_oversize_body_is_refused_before_it_is_read(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(server.url).port, timeout=30)
    connection.putrequest("POST", FLUX)
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(10**12))
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status == 413
    assert answer.getheader("content-type") == "application/json"
    assert str(40 * 2**20) in json.loads(body)["detail"]


FORBIDDEN_URLS = [
    "file:///etc/passwd",
    "ftp://example.com/x",
    "gopher://example.com/x",
    "javascript:alert(1)",
    "http://127.0.0.1/x",
    "http://127.0.0.1:8000/x",
    "http://127.1/x",
    "http://2130706433/x",
    "http://0177.0.0.1/x",
    "http://0.0.0.0/x",
    "http://169.254.169.254/latest/meta-data",
    "http://10.0.0.1/x",
    "http://172.16.0.1/x",
    "http://192.168.1.1/x",
    "http://100.64.0.1/x",
    "http://224.0.0.1/x",
    "http://255.255.255.255/x",
    "http://[::1]/x",
    "http://[::]/x",
    "http://[::ffff:127.0.0.1]/x",
    "http://[fe80::1]/x",
    "http://[fd00::1]/x",
    "http://[64:ff9b::7f00:1]/x",
    "http://user:password@example.com/x",
    "http://user@example.com/x",
    "http://example.com:22/x",
    "http://example.com:25/x",
    "http://example.com:99999/x",
    "http://[::1/x",
    "http:///x",
    "//example.com/x",
    "example.com/x",
    "nonsense",
    "http://exa mple.com/",
    "http://example.com/\r\nx: y",
]


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize("url", FORBIDDEN_URLS)
def test_forbidden_webhook(client: httpx.Client, url: str) -> None:
    entry = first_field_error(client.post("/queue/test/null", params={"fal_webhook": url}, json={"prompt": "x"}))
    assert entry["loc"] == ["query", "fal_webhook"]
    assert entry["input"] == url


BAD_HEADERS = [
    ("x-fal-request-timeout", "soon"),
    ("x-fal-request-timeout", "-1"),
    ("x-fal-request-timeout", "0"),
    ("x-fal-request-timeout", "0.1"),
    ("x-fal-request-timeout", "nan"),
    ("x-fal-request-timeout", "inf"),
    ("x-fal-request-timeout", ""),
    ("x-fal-request-start-timeout", "soon"),
    ("x-fal-object-lifecycle-preference", "{"),
    ("x-fal-object-lifecycle-preference", '{"expiration_duration_seconds": "long"}'),
    ("x-fal-object-lifecycle-preference", '{"expiration_duration_seconds": -1}'),
    ("x-fal-object-lifecycle-preference", "[" * 10_000),
    ("idempotency-key", ""),
    ("idempotency-key", "x" * 256),
]


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize(("name", "value"), BAD_HEADERS)
def test_bad_header(client: httpx.Client, name: str, value: str) -> None:
    answer = client.post("/queue/test/null", json={"prompt": "x"}, headers={name: value})
    assert name.removeprefix("x-fal-") in error_message(answer, 400).lower()
    assert answer.json()["error_type"] == "bad_request"


@pytest.mark.usefixtures("server_still_works")
@pytest.mark.parametrize("value", ["0", "-1", "many", "nan", ""])
def test_bad_max_queue_length(client: httpx.Client, value: str) -> None:
    answer = client.post("/queue/test/null", json={"prompt": "x"}, params={"fal_max_queue_length": value})
    assert "fal_max_queue_length" in error_message(answer, 400)
    assert answer.json()["error_type"] == "bad_request"


def test_a_failing_model_reveals_only_messages_meant_for_the_client(client: httpx.Client) -> None:
    public = client.post("/test/raises", json={"prompt": "told"})
    assert error_message(public, 500) == "This cannot be painted."
    assert public.headers["x-fal-retryable"] == "true"
    private = client.post("/test/raises", json={"prompt": "x"})
    assert error_message(private, 500) == "Internal Server Error"
    assert "secret" not in private.text


def test_queue_full(tmp_path: Path, gate: Gate) -> None:
    with (
        serving(tmp_path / "data", TEST_MODELS, max_running="1", max_queue_length="1") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        running = client.post("/queue/test/gate", json={"prompt": str(gate.path), "num_inference_steps": 1}).json()
        wait_until_claimed(client, running["status_url"])
        waiting = client.post("/queue/test/null", json={"prompt": "x"}).json()
        for path in ("/queue/test/null", "/test/null", "/test/null/stream"):
            answer = client.post(path, json={"prompt": "x"})
            assert "full" in error_message(answer, 429)
            assert int(answer.headers["retry-after"]) > 0
        answer = client.post("/v1/images/generations", json={"prompt": "x", "model": "test/null"})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
        assert "full" in error["message"] and int(answer.headers["retry-after"]) > 0
        gate.release(1)
        wait_until_completed(client, waiting["status_url"])
        assert client.get(running["response_url"]).status_code == 200
        assert client.post("/test/null", json={"prompt": "x"}).status_code == 200


def test_queue_longer_than_the_clients_limit(constrained_client: httpx.Client, gate: Gate) -> None:
    running = constrained_client.post(
        "/queue/test/gate", json={"prompt": str(gate.path), "num_inference_steps": 1}
    ).json()
    wait_until_claimed(constrained_client, running["status_url"])
    limit = {"fal_max_queue_length": "1"}
    first = constrained_client.post("/queue/test/null", json={"prompt": "x"}, params=limit)
    assert first.status_code == 200
    assert "full" in error_message(constrained_client.post("/queue/test/null", json={"prompt": "x"}, params=limit), 429)
    unlimited = constrained_client.post("/queue/test/null", json={"prompt": "x"})
    assert unlimited.json()["queue_position"] == 1
    gate.release(1)
    assert wait_until_completed(constrained_client, unlimited.json()["status_url"])["status"] == "COMPLETED"
