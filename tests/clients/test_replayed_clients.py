"""Tests that replay requests of other clients, written from the clients' sources, and check what each client needs.

Java and Kotlin (fal-java), Swift, Dart, Rust (fal-rs), n8n, SillyTavern, Hugging Face's Python and JavaScript clients,
Pipecat, `fal api`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pytest

from tests.support.server_process import Gate, Server

FLUX = "fal-ai/flux/dev"
KEY = {"authorization": "Key id:secret"}
JSON = {"accept": "application/json", "content-type": "application/json"}
#: The seed is fixed: the demo's safety checker flags one in a few hundred images of this size and one step.
SMALL = {"prompt": "a red apple", "num_inference_steps": 1, "image_size": {"width": 64, "height": 96}, "seed": 42}

Send = Callable[..., httpx.Response]


def by_proxy(client: httpx.Client, method: str, url: str, headers: dict[str, str], **options: Any) -> httpx.Response:
    """Send a request to the proxy URL with the real URL in a header, as in fal's proxy protocol."""
    return client.request(method, "/api/fal/proxy", headers={**headers, "x-fal-target-url": url}, **options)


def by_host(client: httpx.Client, method: str, url: str, headers: dict[str, str], **options: Any) -> httpx.Response:
    """Send a request under fal's host names, as if DNS pointed them at this server; send other URLs unchanged."""
    parts = urlsplit(url)
    if not parts.hostname or not parts.hostname.endswith("fal.run"):
        return client.request(method, url, headers=headers, **options)
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    return client.request(method, path, headers={**headers, "host": parts.hostname}, **options)


def by_base(client: httpx.Client, method: str, url: str, headers: dict[str, str], **options: Any) -> httpx.Response:
    """Send a request to one base URL for runs and to another for the queue."""
    target = url.replace("https://queue.fal.run", f"{client.base_url}/queue").replace("https://fal.run", "")
    return client.request(method, target, headers=headers, **options)


def by_subdomain(
    client: httpx.Client, method: str, url: str, headers: dict[str, str], **options: Any
) -> httpx.Response:
    """Send a request to one origin, with a query parameter that selects the queue, as Hugging Face does."""
    parts = urlsplit(url)
    suffix = "?_subdomain=queue" if parts.hostname == "queue.fal.run" else ""
    return client.request(method, f"{parts.path}{suffix}", headers=headers, **options)


def url_from_ids(submitted: Any) -> str:
    """Build the request's URL from the two-segment endpoint ID and the request ID."""
    return f"https://queue.fal.run/fal-ai/flux/requests/{submitted['request_id']}"


def url_from_response_path(submitted: Any) -> str:
    """Build the request's URL from the client's origin and the path of response_url."""
    return f"https://queue.fal.run{urlsplit(submitted['response_url']).path}"


def url_from_response(submitted: Any) -> str:
    """Return the request's URL as the answer gives it."""
    assert submitted["status_url"] == f"{submitted['response_url']}/status"
    url: str = submitted["response_url"]
    return url


@dataclass(frozen=True)
class Replay:
    """A client: how it reaches the server, what it sends, and how it builds the URL of its request."""

    send: Send
    headers: dict[str, str] = field(default_factory=lambda: {**JSON, **KEY})
    body: dict[str, Any] = field(default_factory=lambda: SMALL)
    #: Builds the request's URL. None for a client that waits for the run.
    url_of: Callable[[Any], str] | None = url_from_ids
    #: Appended to the status URL and to the result URL.
    status_suffix: str = ""
    result_suffix: str = ""
    follows_stream: bool = False
    #: Headers with which the client downloads the image.
    image_headers: dict[str, str] = field(default_factory=dict)


SWIFT_HEADERS = {**JSON, "user-agent": "fal.ai/swift-client 0.1.0 - Version 15.0"}
DART_HEADERS = {"accept": "application/json", "content-type": "application/json; charset=utf-8", **KEY}
SILLY_TAVERN_BODY = {
    **SMALL,
    "seed": None,
    "guidance_scale": 7,
    "enable_safety_checker": False,
    "safety_tolerance": 6,
}
PIPECAT_BODY = {**SMALL, "num_images": 1, "expand_prompt": False, "enable_safety_checker": True, "format": "png"}
HUGGING_FACE_BODY = {**SMALL, "negative_prompt": "blurry", "width": 64, "height": 96, "response_format": "url"}
STRING_FIELDS = {
    "prompt": "a red apple",
    "image_size": {"width": "64", "height": "96"},
    "seed": "42",
    "num_images": "1",
}

CLIENTS = {
    "java run": Replay(by_proxy, url_of=None),
    "java subscribe": Replay(by_proxy, follows_stream=True, status_suffix="?logs=1"),
    "java subscribe without logs": Replay(by_proxy, follows_stream=True),
    "kotlin without a key": Replay(by_proxy, JSON, follows_stream=True, status_suffix="?logs=1"),
    "swift run": Replay(by_proxy, SWIFT_HEADERS, url_of=None),
    "swift subscribe": Replay(by_proxy, SWIFT_HEADERS),
    "dart run": Replay(by_proxy, DART_HEADERS, url_of=None),
    "dart subscribe": Replay(by_proxy, DART_HEADERS, status_suffix="?logs=1"),
    "dart subscribe without logs": Replay(by_proxy, DART_HEADERS, status_suffix="?logs=0"),
    "browser": Replay(by_proxy, {**JSON, "origin": "http://localhost:3000"}, status_suffix="?logs=0"),
    "rust run": Replay(by_host, url_of=None),
    "rust queue": Replay(by_host, url_of=url_from_response, status_suffix="?logs=1"),
    "rust stream": Replay(by_host, url_of=url_from_response, status_suffix="?logs=1", follows_stream=True),
    "n8n": Replay(by_host, body={**SMALL, "seed": "7", "guidance_scale": "3.5"}),
    "n8n by base": Replay(by_base, body={**SMALL, "seed": "7"}, url_of=url_from_response),
    "sillytavern": Replay(by_host, KEY, SILLY_TAVERN_BODY, url_of=url_from_response, image_headers=KEY),
    "hf-js": Replay(by_subdomain, body=HUGGING_FACE_BODY, url_of=url_from_response_path),
    "hf-py": Replay(by_base, {**KEY, "accept": "image/png"}, HUGGING_FACE_BODY, url_of=None),
    "pipecat": Replay(by_base, {**KEY, "content-type": "application/json"}, PIPECAT_BODY, url_of=None),
    "fal api": Replay(by_host, body={**SMALL, **STRING_FIELDS}, status_suffix="/?logs=1", result_suffix="/"),
}
every_client = pytest.mark.parametrize("replay", CLIENTS.values(), ids=CLIENTS)
QUEUEING_CLIENTS = {name: replay for name, replay in CLIENTS.items() if replay.url_of}
queueing_clients = pytest.mark.parametrize("replay", QUEUEING_CLIENTS.values(), ids=QUEUEING_CLIENTS)


def post(client: httpx.Client, replay: Replay, endpoint: str = FLUX) -> httpx.Response:
    """Send the client's POST. The body is JSON whatever its content type is."""
    role = "https://queue.fal.run" if replay.url_of else "https://fal.run"
    content = json.dumps(replay.body).encode()
    return replay.send(client, "POST", f"{role}/{endpoint}", replay.headers, content=content)


def statuses(client: httpx.Client, replay: Replay, url: str) -> Iterator[Any]:
    """Yield each status that the client reads, up to the last."""
    if replay.follows_stream:
        headers = {**replay.headers, "accept": "application/json, text/event-stream"}
        answer = replay.send(client, "GET", f"{url}/status/stream{replay.status_suffix}", headers)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.text.splitlines():
            if line.startswith("data:"):
                yield json.loads(line.removeprefix("data:"))
        return
    status = ""
    while status != "COMPLETED":
        answer = replay.send(client, "GET", f"{url}/status{replay.status_suffix}", replay.headers)
        assert answer.status_code in (200, 202)
        assert answer.headers["content-type"] == "application/json"
        status = answer.json()["status"]
        yield answer.json()


def wants_logs(replay: Replay) -> bool:
    """Return whether the client asks for logs."""
    return "logs=1" in replay.status_suffix


def assert_status(status: Any, request_id: str, has_logs: bool) -> None:
    """Check the fields that Java, Swift, Dart, Rust and SillyTavern need in every status."""
    assert status["status"] in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED")
    assert status["request_id"] == request_id
    for name in ("response_url", "status_url", "cancel_url"):
        assert urlsplit(status[name]).scheme in ("http", "https")
    # Swift fails if the key is missing, but accepts a null value.
    assert "logs" in status
    assert isinstance(status["logs"], list) is has_logs
    assert "queue_position" not in status or type(status["queue_position"]) is int
    for log in status["logs"] or ():
        assert {"message", "timestamp", "level", "source"} <= {name for name in log if isinstance(log[name], str)}
        assert log["labels"]["level"] in ("STDERR", "STDOUT", "ERROR", "INFO", "WARN", "DEBUG")


def assert_output(output: Any) -> None:
    """Check what Swift (range of integers), Rust (required fields) and @ai-sdk/fal (no nulls) need in every output."""
    assert set(output) == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
    assert None not in output.values()
    assert type(output["seed"]) is int
    assert 0 <= output["seed"] < 2**53
    assert output["has_nsfw_concepts"] == [False]
    assert output["prompt"] == "a red apple"
    assert output["timings"]
    assert all(isinstance(seconds, float) for seconds in output["timings"].values())
    (image,) = output["images"]
    assert [type(image[name]) for name in ("url", "content_type", "width", "height")] == [str, str, int, int]
    assert (image["width"], image["height"], image["content_type"]) == (64, 96, "image/jpeg")


def assert_result(answer: httpx.Response) -> None:
    """Check for status 200 (Rust), JSON (JavaScript) and a request ID header in any letter case (Java)."""
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["X-Fal-Request-Id"]
    assert_output(answer.json())


def assert_image(client: httpx.Client, replay: Replay, answer: httpx.Response) -> None:
    """Check that the image downloads with a plain GET from the client's origin, with the client's headers."""
    url = answer.json()["images"][0]["url"]
    assert url.startswith(f"{client.base_url}/files/".replace("//files", "/files"))
    image = client.get(url, headers=replay.image_headers)
    assert (image.status_code, image.headers["content-type"]) == (200, "image/jpeg")
    assert image.content.startswith(b"\xff\xd8\xff")


@every_client
def test_from_request_to_image(client: httpx.Client, replay: Replay) -> None:
    answer = post(client, replay)
    assert answer.status_code == 200
    if replay.url_of:
        submitted = answer.json()
        request_id = submitted["request_id"]
        assert UUID(request_id)
        assert_status({**submitted, "logs": [] if wants_logs(replay) else None}, request_id, wants_logs(replay))
        url = replay.url_of(submitted)
        received = list(statuses(client, replay, url))
        for status in received:
            assert_status(status, request_id, wants_logs(replay))
        # Java fetches the result of the request ID in the last event.
        assert (received[-1]["status"], received[-1]["request_id"]) == ("COMPLETED", request_id)
        answer = replay.send(client, "GET", f"{url}{replay.result_suffix}", replay.headers)
        assert answer.headers["x-fal-request-id"] == request_id
        # SillyTavern follows the response_url of the status.
        assert client.get(received[-1]["response_url"]).json() == answer.json()
    assert_result(answer)
    assert_image(client, replay, answer)


@queueing_clients
def test_every_state_has_the_required_fields(constrained_client: httpx.Client, gate: Gate, replay: Replay) -> None:
    holder = {**SMALL, "prompt": str(gate.path), "num_inference_steps": 2}
    running = constrained_client.post("/queue/test/gate", json=holder).json()
    submitted = post(constrained_client, replay, "test/null").json()
    for request, state in (submitted, "IN_QUEUE"), (running, "IN_PROGRESS"):
        status = status_in_state(constrained_client, replay, request["response_url"], state)
        assert_status(status, request["request_id"], wants_logs(replay))
        assert ("queue_position" in status) is (state == "IN_QUEUE")
    gate.release(2)
    *_, last = statuses(constrained_client, poller(replay), as_proxied(submitted["response_url"]))
    assert_status(last, submitted["request_id"], wants_logs(replay))


def poller(replay: Replay) -> Replay:
    """Return a client with the same headers and logs option that polls through the proxy."""
    return Replay(by_proxy, replay.headers, status_suffix="?logs=1" if wants_logs(replay) else "")


def as_proxied(url: str) -> str:
    """Translate a URL of this server to the fal URL that it stands for."""
    return f"https://queue.fal.run{urlsplit(url).path.removeprefix('/queue')}"


def status_in_state(client: httpx.Client, replay: Replay, url: str, state: str) -> Any:
    """Poll until the request is in this state and return that status."""
    return next(status for status in statuses(client, poller(replay), as_proxied(url)) if status["status"] == state)


INVALID_BODIES: dict[str, tuple[int, dict[str, Any]]] = {
    "bad field": (422, {"prompt": 5}),
    "no prompt": (422, {}),
    "bad size": (422, {"prompt": "x", "image_size": "huge"}),
}


@every_client
@pytest.mark.parametrize("reason", INVALID_BODIES)
def test_validation_errors_are_readable(client: httpx.Client, replay: Replay, reason: str) -> None:
    status, body = INVALID_BODIES[reason]
    invalid = Replay(replay.send, replay.headers, body, replay.url_of)
    answer = post(client, invalid)
    assert answer.status_code == status
    # Dart and Java decode the body as JSON without checking the content type.
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-fal-request-id"]
    for problem in answer.json()["detail"]:
        # SillyTavern shows loc[1] and the message.
        assert problem["loc"][0] == "body"
        assert all(isinstance(part, str) for part in problem["loc"])
        assert problem["msg"]
        assert problem["type"]


@every_client
def test_not_found_errors_are_readable(client: httpx.Client, replay: Replay) -> None:
    requests = [("POST", "https://fal.run/fal-ai/unknown"), ("POST", "https://queue.fal.run/fal-ai/unknown")]
    unknown = "https://queue.fal.run/fal-ai/flux/requests/0"
    requests += [("GET", f"{unknown}/status"), ("GET", unknown), ("PUT", f"{unknown}/cancel")]
    for method, url in requests:
        answer = replay.send(client, method, url, replay.headers, json=SMALL if method == "POST" else None)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/json"
        assert isinstance(answer.json()["detail"], str)


@pytest.mark.parametrize("scheme", ["Key", "Bearer"])
def test_every_route_requires_a_key(keyless_client: httpx.Client, scheme: str) -> None:
    for send in (by_proxy, by_host, by_base, by_subdomain):
        for role in ("https://fal.run", "https://queue.fal.run"):
            body = {"prompt": "x"}
            assert send(keyless_client, "POST", f"{role}/test/null", JSON, json=body).status_code == 401
            headers = {**JSON, "authorization": f"{scheme} alice:secret"}
            assert send(keyless_client, "POST", f"{role}/test/null", headers, json=body).status_code == 200


def test_dart_uploads(server: Server, client: httpx.Client) -> None:
    body = {"file_name": "small.png", "content_type": "image/png"}
    answer = by_proxy(client, "POST", "https://rest.alpha.fal.ai/storage/upload/initiate", DART_HEADERS, json=body)
    signed = answer.json()
    # The PUT bypasses the proxy and carries no key.
    put = client.put(signed["upload_url"], content=b"\x89PNG", headers={"content-type": "image/png"})
    assert put.is_success
    stored = client.get(signed["file_url"])
    assert (stored.content, stored.headers["content-type"]) == (b"\x89PNG", "image/png")
    assert signed["file_url"].startswith(f"{server.url}/files/")


@pytest.mark.parametrize("client_name", ["java", "rust"])
def test_cancel(constrained_client: httpx.Client, gate: Gate, client_name: str) -> None:
    holder = {**SMALL, "prompt": str(gate.path), "num_inference_steps": 1}
    constrained_client.post("/queue/test/gate", json=holder)
    submitted = constrained_client.post("/queue/test/null", json=SMALL).json()
    url = as_proxied(submitted["cancel_url"]) if client_name == "java" else submitted["cancel_url"]
    answer = (by_proxy if client_name == "java" else by_host)(constrained_client, "PUT", url, {**JSON, **KEY})
    assert answer.is_success
    assert answer.json()["status"] in ("OK", "CANCELLATION_REQUESTED")
