"""Tests of --testing over HTTP: faults in every mode, webhooks, records per key, and what the server leaves behind."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from pytest_httpserver import HTTPServer
from pytest_httpserver.httpserver import HandlerType

from tests.support.server_process import (
    TEST_MODELS,
    Server,
    serving,
    wait_until,
    wait_until_claimed,
    wait_until_completed,
)

PATH, QUEUED, BODY = "/test/null", "/queue/test/null", {"prompt": "a", "image_size": {"width": 64, "height": 64}}


@pytest.fixture(scope="module")
def testing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server for tests, without weights."""
    settings = {"testing": "true", "openai_models": "gpt=test/null"}
    with serving(tmp_path_factory.mktemp("testing"), TEST_MODELS, **settings) as server:
        yield server.ready()


@pytest.fixture
def client(testing_server: Server) -> Iterator[httpx.Client]:
    """Yield a client of the server for tests, which has no faults."""
    with httpx.Client(base_url=testing_server.url, timeout=60, trust_env=False) as client:
        assert client.post("/testing/reset").status_code == 200
        yield client


def plan(client: httpx.Client, key: str = "", **fault: Any) -> str:
    """Plan a fault; return its id."""
    response = client.post("/testing/next", json=fault, headers=authorization(key))
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def authorization(key: str) -> dict[str, str]:
    """Return the header for a key; nothing for an empty one."""
    return {"authorization": f"Key {key}"} if key else {}


def requests(client: httpx.Client, key: str = "") -> list[dict[str, Any]]:
    """Return the recorded requests."""
    found: list[dict[str, Any]] = client.get("/testing/requests", headers=authorization(key)).json()["requests"]
    return found


def test_off_without_the_option(constrained_server: Server) -> None:
    controls = {"next": "POST", "reset": "POST", "release": "POST", "requests": "GET"}
    for path, method in {**controls, "environment": "GET", "certificates": "GET"}.items():
        assert httpx.request(method, f"{constrained_server.url}/testing/{path}", trust_env=False).status_code == 404


def test_no_certificates_without_a_tls_port(client: httpx.Client) -> None:
    response = client.get("/testing/certificates")
    assert (response.status_code, "--tls-port is 0" in response.text) == (404, True)


def test_an_idempotency_key_of_an_earlier_test_can_be_held(client: httpx.Client) -> None:
    """Check that a reset makes the key new, for a request that is held and then released."""
    for prompt in ("a", "b"):
        client.post("/testing/reset")
        plan(client, hold=True)
        urls = client.post(QUEUED, json={**BODY, "prompt": prompt}, headers={"idempotency-key": "one"}).json()
        assert client.get(urls["status_url"]).json()["status"] == "IN_QUEUE"
        assert client.post("/testing/release").json() == {"released": 1}
        assert wait_until_completed(client, urls["status_url"])["status"] == "COMPLETED"
        assert client.get(urls["response_url"]).json()["prompt"] == prompt


def test_a_run_fails_with_the_status_and_the_next_one_works(client: httpx.Client) -> None:
    for status in (401, 404, 422, 429, 499, 500, 504):
        plan(client, status=status)
        assert client.post(PATH, json=BODY).status_code == status
    assert client.post(PATH, json=BODY).status_code == 200
    assert [request["refused"] for request in requests(client)] == [401, 404, None, 429, None, None, None, None]


def test_a_refusal_says_when_to_try_again(client: httpx.Client) -> None:
    plan(client, status=429, retry_after=3)
    response = client.post(QUEUED, json=BODY)
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")


def test_a_queued_request_is_accepted_and_fails_later(client: httpx.Client) -> None:
    plan(client, status=422, field="image_size")
    submitted = client.post(QUEUED, json=BODY)
    assert submitted.status_code == 200
    assert wait_until_completed(client, submitted.json()["status_url"])["status"] == "COMPLETED"
    result = client.get(submitted.json()["response_url"])
    assert (result.status_code, result.json()["detail"][0]["loc"]) == (422, ["body", "image_size"])


def test_a_stream_fails(client: httpx.Client) -> None:
    plan(client, status=500)
    lines: list[str] = []
    with (
        pytest.raises(httpx.RemoteProtocolError),
        client.stream("POST", f"{PATH}/stream", json=BODY) as response,
    ):
        lines.extend(response.iter_lines())
    assert "Internal Server Error" in "".join(lines)
    assert requests(client)[0]["mode"] == "stream"


def test_openais_package_gets_openais_errors(client: httpx.Client, testing_server: Server) -> None:
    with openai.OpenAI(base_url=f"{testing_server.url}/v1", api_key="any", max_retries=0) as sdk:
        plan(client, status=429, retry_after=2)
        with pytest.raises(openai.RateLimitError) as limit:
            sdk.images.generate(model="gpt", prompt="a", size="256x256")
        assert limit.value.response.headers["retry-after"] == "2"
        plan(client, status=422)
        with pytest.raises(openai.BadRequestError, match="prompt"):
            sdk.images.generate(model="gpt", prompt="a", size="256x256")


def test_a_flagged_image_is_black(client: httpx.Client, tmp_path: Path) -> None:
    plan(client, flag=True)
    flagged, other = client.post(PATH, json=BODY).json(), client.post(PATH, json=BODY).json()
    assert (flagged["has_nsfw_concepts"], other["has_nsfw_concepts"]) == ([True], [False])
    (tmp_path / "flagged").write_bytes(client.get(flagged["images"][0]["url"]).content)
    with Image.open(tmp_path / "flagged") as image:
        assert image.convert("L").getextrema() == (0, 0)


def test_the_checker_flags_nothing_if_the_request_turns_it_off(client: httpx.Client) -> None:
    plan(client, flag=True)
    assert client.post(PATH, json={**BODY, "enable_safety_checker": False}).json()["has_nsfw_concepts"] == [False]


def test_a_delayed_request_is_in_progress_and_can_be_cancelled(client: httpx.Client) -> None:
    plan(client, delay=600)
    urls = client.post(QUEUED, json=BODY).json()
    assert wait_until_claimed(client, urls["status_url"])["status"] == "IN_PROGRESS"
    assert client.put(urls["cancel_url"]).status_code == 202
    assert wait_until_completed(client, urls["status_url"])["error_type"] == "client_cancelled"
    assert requests(client)[0]["is_cancelled"]


def test_a_delay_ends(client: httpx.Client) -> None:
    plan(client, delay=0.5)
    assert client.post(PATH, json=BODY).status_code == 200


def test_a_held_request_waits_at_its_position(client: httpx.Client) -> None:
    hold = plan(client, hold=True, queue_position=3)
    urls = client.post(QUEUED, json=BODY).json()
    assert urls["queue_position"] == 3
    # The worker takes other requests meanwhile.
    assert client.post(PATH, json=BODY).status_code == 200
    assert client.get(urls["status_url"]).json()["status"] == "IN_QUEUE"
    assert client.post("/testing/release", json={"id": hold}).json() == {"released": 1}
    assert wait_until_completed(client, urls["status_url"])["status"] == "COMPLETED"
    assert client.get(urls["response_url"]).status_code == 200


def test_webhooks_come_twice_or_late(client: httpx.Client, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/hook", handler_type=HandlerType.PERMANENT).respond_with_data("")
    plan(client, webhook_copies=2)
    plan(client, webhook_delay=600)
    hook = {"fal_webhook": httpserver.url_for("/hook")}
    first, late, other = (client.post(QUEUED, params=hook, json=BODY).json() for _ in range(3))
    assert wait_until_completed(client, late["status_url"])["status"] == "COMPLETED"
    wait_until(lambda: len(httpserver.log) == 3)
    received = sorted(request.get_json()["request_id"] for request, _ in httpserver.log)
    assert received == sorted([first["request_id"], first["request_id"], other["request_id"]])


def test_each_key_sees_its_own_requests_and_faults(client: httpx.Client) -> None:
    plan(client, "one", status=429)
    for key, status in [("two", 200), ("one", 429), ("one", 200)]:
        assert client.post(PATH, json=BODY, headers=authorization(key)).status_code == status
    assert [request["refused"] for request in requests(client, "one")] == [429, None]
    assert len(requests(client, "two")) == 1
    assert len(requests(client)) == 3
    client.post("/testing/reset", headers=authorization("one"))
    assert (len(requests(client, "one")), len(requests(client, "two"))) == (0, 1)


def test_records_hold_what_was_sent(client: httpx.Client) -> None:
    before = time.time()
    client.post(QUEUED, json={**BODY, "prompt": "a fox", "seed": 3}, headers={"x-fal-queue-priority": "low"})
    (request,) = requests(client)
    assert (request["endpoint"], request["mode"], request["priority"]) == ("test/null", "queue", "low")
    assert (request["input"]["prompt"], request["input"]["seed"]) == ("a fox", 3)
    assert before <= request["submitted_at"] <= time.time()
    assert client.post(QUEUED, json={}).status_code == 422
    assert len(requests(client)) == 1


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("next", {}, "name at least one of"),
        ("next", {"colour": 500}, "body.colour: Extra inputs"),
        ("next", {"delay": "soon"}, "body.delay: Input should be a valid number"),
        ("next", {"flag": True, "endpoint": "test/nul"}, "body.endpoint: Unknown endpoint; this server has test/copy"),
        ("next", [], "body: Input should be an object"),
        ("release", {"name": "x"}, "body.name: Extra inputs"),
    ],
)
def test_bad_input_names_the_field(client: httpx.Client, path: str, body: Any, message: str) -> None:
    response = client.post(f"/testing/{path}", json=body)
    assert response.status_code == 422
    assert message in response.json()["message"]


def test_web_pages_of_other_origins_have_no_controls(client: httpx.Client) -> None:
    headers = {"origin": "https://example.com"}
    assert client.post("/testing/reset", headers=headers).status_code == 403
    assert client.post("/testing/reset", headers={"host": "example.com"}).status_code == 421


def test_fixed_keys_stay_required(tmp_path: Path) -> None:
    settings = {"testing": "true", "keys": "alice:secret"}
    with serving(tmp_path, TEST_MODELS, **settings) as server:
        server.ready()
        url = f"{server.url}/testing/environment"
        assert httpx.get(url, trust_env=False).status_code == 401
        known = httpx.get(url, headers=authorization("alice:secret"), trust_env=False)
        assert known.json()["variables"]["FAL_KEY"] == "alice:secret"


def test_ray_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS, testing="true", ray="local") as server:
        server.wait_for("--testing cannot be used with --ray")
        assert server.process.wait() == 2


START = """
import os, subprocess, sys
command = [sys.executable, "-m", "server", "serve", "test/null=demo", "--testing"]
subprocess.Popen([*command, "--exit-with-process", str(os.getpid())])
sys.stdin.read()
"""


def test_nothing_is_left_when_the_test_run_is_killed(constrained_server: Server, tmp_path: Path) -> None:
    """Check that free ports and a temporary directory are chosen, and that SIGKILL of the test run ends the server."""
    left_out = ("PORT", "TLS_PORT", "DATA_DIR")
    environment = {
        name: value
        for name, value in constrained_server.environment().items()
        if name.removeprefix("FLUX_SERVER_") not in left_out
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = [sys.executable, "-c", START]
    with subprocess.Popen(run, env={**environment, "TMPDIR": str(tmp_path)}, text=True, **pipes) as started:  # type: ignore[call-overload]
        lines = iter(started.stdout.readline, "")
        addresses = next(line for line in lines if "listens on" in line).split()
        url = addresses[3]
        variables = httpx.get(f"{url}/testing/environment", trust_env=False).json()["variables"]
        assert Path(variables["SSL_CERT_FILE"]).is_relative_to(tmp_path)
        assert url not in ("http://127.0.0.1:8000", constrained_server.url)
        started.send_signal(signal.SIGKILL)
        # The server holds the pipe open until it ends.
        assert "stopping" in started.stdout.read()
    wait_until(lambda: not list(tmp_path.iterdir()))
