"""Clients replayed from their sources: their requests, and what they demand of the answers.

Java and Kotlin (fal-java), Swift, Dart, Rust (fal-rs), n8n, SillyTavern, Hugging Face's two, Pipecat, `fal api`.
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
#: With a seed: of pictures this small, after one step, the demo's checker takes one in some hundreds for the sign.
SMALL = {"prompt": "a red apple", "num_inference_steps": 1, "image_size": {"width": 64, "height": 96}, "seed": 42}

Send = Callable[..., httpx.Response]


def by_proxy(client: httpx.Client, method: str, url: str, headers: dict[str, str], **more: Any) -> httpx.Response:
    """To the one proxy URL, with the real one in a header, as fal's proxy protocol has it."""
    return client.request(method, "/api/fal/proxy", headers={**headers, "x-fal-target-url": url}, **more)


def by_host(client: httpx.Client, method: str, url: str, headers: dict[str, str], **more: Any) -> httpx.Response:
    """Under fal's own names, which DNS or the hosts file brings here; URLs in our answers are taken as they are."""
    parts = urlsplit(url)
    if not parts.hostname or not parts.hostname.endswith("fal.run"):
        return client.request(method, url, headers=headers, **more)
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    return client.request(method, path, headers={**headers, "host": parts.hostname}, **more)


def by_base(client: httpx.Client, method: str, url: str, headers: dict[str, str], **more: Any) -> httpx.Response:
    """With a base URL for runs and another for the queue."""
    place = url.replace("https://queue.fal.run", f"{client.base_url}/queue").replace("https://fal.run", "")
    return client.request(method, place, headers=headers, **more)


def by_subdomain(client: httpx.Client, method: str, url: str, headers: dict[str, str], **more: Any) -> httpx.Response:
    """On one origin, where a parameter tells the queue from runs: Hugging Face's way."""
    parts = urlsplit(url)
    suffix = "?_subdomain=queue" if parts.hostname == "queue.fal.run" else ""
    return client.request(method, f"{parts.path}{suffix}", headers=headers, **more)


def rebuilt(submitted: Any) -> str:
    """The request's URL from the two-segment id and the request id."""
    return f"https://queue.fal.run/fal-ai/flux/requests/{submitted['request_id']}"


def rebuilt_from_path(submitted: Any) -> str:
    """The request's URL from one's own origin and the path of response_url."""
    return f"https://queue.fal.run{urlsplit(submitted['response_url']).path}"


def as_given(submitted: Any) -> str:
    """The request's URL as the answer says."""
    assert submitted["status_url"] == f"{submitted['response_url']}/status"
    url: str = submitted["response_url"]
    return url


@dataclass(frozen=True)
class Replay:
    """One client: how it gets here, what it sends, and how it finds its request again."""

    send: Send
    headers: dict[str, str] = field(default_factory=lambda: {**JSON, **KEY})
    body: dict[str, Any] = field(default_factory=lambda: SMALL)
    #: None for a client that runs, and waits.
    url_of: Callable[[Any], str] | None = rebuilt
    #: What is behind /status, and behind the request's own URL.
    status_suffix: str = ""
    result_suffix: str = ""
    follows_stream: bool = False
    #: Headers that the picture is asked for with.
    picture_headers: dict[str, str] = field(default_factory=dict)


SWIFT = {**JSON, "user-agent": "fal.ai/swift-client 0.1.0 - Version 15.0"}
DART = {"accept": "application/json", "content-type": "application/json; charset=utf-8", **KEY}
SILLY_TAVERN = {
    **SMALL,
    "seed": None,
    "guidance_scale": 7,
    "enable_safety_checker": False,
    "safety_tolerance": 6,
}
PIPECAT = {**SMALL, "num_images": 1, "expand_prompt": False, "enable_safety_checker": True, "format": "png"}
HUGGING_FACE = {**SMALL, "negative_prompt": "blurry", "width": 64, "height": 96, "response_format": "url"}
BY_HAND = {"prompt": "a red apple", "image_size": {"width": "64", "height": "96"}, "seed": "42", "num_images": "1"}

CLIENTS = {
    "java run": Replay(by_proxy, url_of=None),
    "java subscribe": Replay(by_proxy, follows_stream=True, status_suffix="?logs=1"),
    "java subscribe without logs": Replay(by_proxy, follows_stream=True),
    "kotlin without a key": Replay(by_proxy, JSON, follows_stream=True, status_suffix="?logs=1"),
    "swift run": Replay(by_proxy, SWIFT, url_of=None),
    "swift subscribe": Replay(by_proxy, SWIFT),
    "dart run": Replay(by_proxy, DART, url_of=None),
    "dart subscribe": Replay(by_proxy, DART, status_suffix="?logs=1"),
    "dart subscribe without logs": Replay(by_proxy, DART, status_suffix="?logs=0"),
    "browser": Replay(by_proxy, {**JSON, "origin": "http://localhost:3000"}, status_suffix="?logs=0"),
    "rust run": Replay(by_host, url_of=None),
    "rust queue": Replay(by_host, url_of=as_given, status_suffix="?logs=1"),
    "rust stream": Replay(by_host, url_of=as_given, status_suffix="?logs=1", follows_stream=True),
    "n8n": Replay(by_host, body={**SMALL, "seed": "7", "guidance_scale": "3.5"}),
    "n8n by base": Replay(by_base, body={**SMALL, "seed": "7"}, url_of=as_given),
    "sillytavern": Replay(by_host, KEY, SILLY_TAVERN, url_of=as_given, picture_headers=KEY),
    "hf-js": Replay(by_subdomain, body=HUGGING_FACE, url_of=rebuilt_from_path),
    "hf-py": Replay(by_base, {**KEY, "accept": "image/png"}, HUGGING_FACE, url_of=None),
    "pipecat": Replay(by_base, {**KEY, "content-type": "application/json"}, PIPECAT, url_of=None),
    "fal api": Replay(by_host, body={**SMALL, **BY_HAND}, status_suffix="/?logs=1", result_suffix="/"),
}
everyone = pytest.mark.parametrize("replay", CLIENTS.values(), ids=CLIENTS)
QUEUED = {name: replay for name, replay in CLIENTS.items() if replay.url_of}
who_queues = pytest.mark.parametrize("replay", QUEUED.values(), ids=QUEUED)


def answered(client: httpx.Client, replay: Replay, endpoint: str = FLUX) -> httpx.Response:
    """The POST of a client, which sends JSON whatever it calls it."""
    role = "https://queue.fal.run" if replay.url_of else "https://fal.run"
    content = json.dumps(replay.body).encode()
    return replay.send(client, "POST", f"{role}/{endpoint}", replay.headers, content=content)


def statuses(client: httpx.Client, replay: Replay, url: str) -> Iterator[Any]:
    """The statuses that a client reads, to the last."""
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
    """Whether it asks for them."""
    return "logs=1" in replay.status_suffix


def assert_status(status: Any, request_id: str, has_logs: bool) -> None:
    """What Java, Swift, Dart, Rust and SillyTavern need of every status."""
    assert status["status"] in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED")
    assert status["request_id"] == request_id
    for name in ("response_url", "status_url", "cancel_url"):
        assert urlsplit(status[name]).scheme in ("http", "https")
    # Swift fails without the key, even where there is nothing in it.
    assert "logs" in status
    assert isinstance(status["logs"], list) is has_logs
    assert "queue_position" not in status or type(status["queue_position"]) is int
    for log in status["logs"] or ():
        assert {"message", "timestamp", "level", "source"} <= {name for name in log if isinstance(log[name], str)}
        assert log["labels"]["level"] in ("STDERR", "STDOUT", "ERROR", "INFO", "WARN", "DEBUG")


def assert_output(output: Any) -> None:
    """What Swift's integers, Rust's required fields and @ai-sdk/fal's refusal of null need of every output."""
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
    """Exactly 200 for Rust, JSON for JavaScript, a request id for Java, in any spelling of its header."""
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["X-Fal-Request-Id"]
    assert_output(answer.json())


def assert_picture(client: httpx.Client, replay: Replay, answer: httpx.Response) -> None:
    """A plain GET, with no key or with one, of the origin that the client knows."""
    url = answer.json()["images"][0]["url"]
    assert url.startswith(f"{client.base_url}/files/".replace("//files", "/files"))
    picture = client.get(url, headers=replay.picture_headers)
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/jpeg")
    assert picture.content.startswith(b"\xff\xd8\xff")


@everyone
def test_from_the_request_to_the_picture(client: httpx.Client, replay: Replay) -> None:
    answer = answered(client, replay)
    assert answer.status_code == 200
    if replay.url_of:
        submitted = answer.json()
        request_id = submitted["request_id"]
        assert UUID(request_id)
        assert_status({**submitted, "logs": [] if wants_logs(replay) else None}, request_id, wants_logs(replay))
        url = replay.url_of(submitted)
        seen = list(statuses(client, replay, url))
        for status in seen:
            assert_status(status, request_id, wants_logs(replay))
        # Java asks for the result of the request that the last event names.
        assert (seen[-1]["status"], seen[-1]["request_id"]) == ("COMPLETED", request_id)
        answer = replay.send(client, "GET", f"{url}{replay.result_suffix}", replay.headers)
        assert answer.headers["x-fal-request-id"] == request_id
        # SillyTavern goes by what the status says.
        assert client.get(seen[-1]["response_url"]).json() == answer.json()
    assert_result(answer)
    assert_picture(client, replay, answer)


@who_queues
def test_every_state_has_what_it_needs(narrow_client: httpx.Client, gate: Gate, replay: Replay) -> None:
    holder = {**SMALL, "prompt": str(gate.path), "num_inference_steps": 2}
    running = narrow_client.post("/queue/test/gate", json=holder).json()
    submitted = answered(narrow_client, replay, "test/null").json()
    for one, state in (submitted, "IN_QUEUE"), (running, "IN_PROGRESS"):
        found = in_state(narrow_client, replay, one["response_url"], state)
        assert_status(found, one["request_id"], wants_logs(replay))
        assert ("queue_position" in found) is (state == "IN_QUEUE")
    gate.let(2)
    *_, last = statuses(narrow_client, poller(replay), as_proxied(submitted["response_url"]))
    assert_status(last, submitted["request_id"], wants_logs(replay))


def poller(replay: Replay) -> Replay:
    """The same questions, asked by polling through the proxy."""
    return Replay(by_proxy, replay.headers, status_suffix="?logs=1" if wants_logs(replay) else "")


def as_proxied(url: str) -> str:
    """A URL of ours as the fal URL that it stands for."""
    return f"https://queue.fal.run{urlsplit(url).path.removeprefix('/queue')}"


def in_state(client: httpx.Client, replay: Replay, url: str, state: str) -> Any:
    """The first status that says so."""
    return next(status for status in statuses(client, poller(replay), as_proxied(url)) if status["status"] == state)


REFUSED: dict[str, tuple[int, dict[str, Any]]] = {
    "bad field": (422, {"prompt": 5}),
    "no prompt": (422, {}),
    "bad size": (422, {"prompt": "x", "image_size": "huge"}),
}


@everyone
@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_can_be_read(client: httpx.Client, replay: Replay, reason: str) -> None:
    status, body = REFUSED[reason]
    refused = Replay(replay.send, replay.headers, body, replay.url_of)
    answer = answered(client, refused)
    assert answer.status_code == status
    # Dart and Java decode it as JSON without a look.
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-fal-request-id"]
    for problem in answer.json()["detail"]:
        # SillyTavern shows the second place and the message.
        assert problem["loc"][0] == "body"
        assert all(isinstance(place, str) for place in problem["loc"])
        assert problem["msg"]
        assert problem["type"]


@everyone
def test_what_is_not_there_can_be_read(client: httpx.Client, replay: Replay) -> None:
    requests = [("POST", "https://fal.run/fal-ai/unknown"), ("POST", "https://queue.fal.run/fal-ai/unknown")]
    unknown = "https://queue.fal.run/fal-ai/flux/requests/0"
    requests += [("GET", f"{unknown}/status"), ("GET", unknown), ("PUT", f"{unknown}/cancel")]
    for method, url in requests:
        answer = replay.send(client, method, url, replay.headers, json=SMALL if method == "POST" else None)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/json"
        assert isinstance(answer.json()["detail"], str)


@pytest.mark.parametrize("scheme", ["Key", "Bearer"])
def test_a_key_is_asked_for_by_every_way(keyed_client: httpx.Client, scheme: str) -> None:
    for send in (by_proxy, by_host, by_base, by_subdomain):
        for role in ("https://fal.run", "https://queue.fal.run"):
            body = {"prompt": "x"}
            assert send(keyed_client, "POST", f"{role}/test/null", JSON, json=body).status_code == 401
            headers = {**JSON, "authorization": f"{scheme} alice:secret"}
            assert send(keyed_client, "POST", f"{role}/test/null", headers, json=body).status_code == 200


def test_dart_uploads(server: Server, client: httpx.Client) -> None:
    wanted = {"file_name": "small.png", "content_type": "image/png"}
    answer = by_proxy(client, "POST", "https://rest.alpha.fal.ai/storage/upload/initiate", DART, json=wanted)
    signed = answer.json()
    # Sent past the proxy, without a key.
    put = client.put(signed["upload_url"], content=b"\x89PNG", headers={"content-type": "image/png"})
    assert put.is_success
    found = client.get(signed["file_url"])
    assert (found.content, found.headers["content-type"]) == (b"\x89PNG", "image/png")
    assert signed["file_url"].startswith(f"{server.url}/files/")


@pytest.mark.parametrize("cancelled", ["java", "rust"])
def test_cancelling(narrow_client: httpx.Client, gate: Gate, cancelled: str) -> None:
    holder = {**SMALL, "prompt": str(gate.path), "num_inference_steps": 1}
    narrow_client.post("/queue/test/gate", json=holder)
    submitted = narrow_client.post("/queue/test/null", json=SMALL).json()
    url = as_proxied(submitted["cancel_url"]) if cancelled == "java" else submitted["cancel_url"]
    answer = (by_proxy if cancelled == "java" else by_host)(narrow_client, "PUT", url, {**JSON, **KEY})
    assert answer.is_success
    assert answer.json()["status"] in ("OK", "CANCELLATION_REQUESTED")
