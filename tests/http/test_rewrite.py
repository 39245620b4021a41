"""Every host, path and header by which a client may reach this server, and the URLs in the answers."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic_core import from_json
from starlette.responses import PlainTextResponse

from server.api.middleware.host_check import HostCheckMiddleware
from server.settings import Settings
from tests.support.server_process import TEST_MODELS, Gate, Server, serving, wait_until_claimed

FLUX = "fal-ai/flux/dev"
SMALL = {"prompt": "x", "seed": 5, "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}
PROXY = "/api/fal/proxy"
FORWARDED = {"x-forwarded-proto": "https", "x-forwarded-host": "pics.example.com", "x-forwarded-prefix": "/flux"}

#: The ways to reach fal's queue; the last three are values of the Host header.
TO_QUEUE = ["prefix", "parameter", "proxy", "queue.localhost", "queue.fal.run", "queue.falrun.com"]
by_every_way = pytest.mark.parametrize("way", TO_QUEUE)
with_and_without_slash = pytest.mark.parametrize("slash", ["", "/"], ids=["plain", "slash"])


def queue(client: httpx.Client, way: str, method: str, path: str, **options: Any) -> httpx.Response:
    """Send a request to `path` of fal's queue in one of these ways."""
    if way == "prefix":
        return client.request(method, f"/queue/{path}", **options)
    if way == "parameter":
        return client.request(method, f"/{path}?_subdomain=queue", **options)
    if way == "proxy":
        return client.request(method, PROXY, headers={"x-fal-target-url": f"https://queue.fal.run/{path}"}, **options)
    return client.request(method, f"/{path}", headers={"host": f"{way}:{client.base_url.port}"}, **options)


def base_for(client: httpx.Client, way: str) -> str:
    """Return the start of the URLs in answers to a request that came in this way."""
    url = f"http://127.0.0.1:{client.base_url.port}/queue"
    return f"http://queue.localhost:{client.base_url.port}" if way == "queue.localhost" else url


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """Parse the events of a stream that has ended."""
    return [from_json(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.9", "[::1]", "fal.run", "falrun.com", "LOCALHOST"])
@with_and_without_slash
def test_run_by_host(client: httpx.Client, host: str, slash: str) -> None:
    headers = {"host": f"{host}:{client.base_url.port}"}
    answer = client.post(f"/test/null{slash}", json=SMALL, headers=headers)
    assert (answer.status_code, answer.json()["seed"]) == (200, 5)
    expected = "127.0.0.1" if host.endswith("run") or host == "falrun.com" else host
    assert answer.json()["images"][0]["url"].startswith(f"http://{expected}:{client.base_url.port}/files/")


@with_and_without_slash
def test_run_by_proxy(client: httpx.Client, slash: str) -> None:
    headers = {"x-fal-target-url": f"https://fal.run/test/null{slash}"}
    answer = client.post(f"{PROXY}{slash}", json=SMALL, headers=headers)
    assert (answer.status_code, answer.json()["seed"]) == (200, 5)
    assert answer.json()["images"][0]["url"].startswith(f"{client.base_url}/files/".replace("//files", "/files"))


@with_and_without_slash
def test_stream(client: httpx.Client, slash: str) -> None:
    answer = client.post(f"/test/null/stream{slash}", json=SMALL)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events(answer)[-1]["seed"] == 5


def test_stream_by_proxy(client: httpx.Client) -> None:
    headers = {"x-fal-target-url": "https://fal.run/test/null/stream", "accept": "application/json, text/event-stream"}
    assert events(client.post(PROXY, json=SMALL, headers=headers))[-1]["seed"] == 5


@by_every_way
@pytest.mark.parametrize("app", ["fal-ai/flux", FLUX], ids=["two-segments", "full"])
@with_and_without_slash
def test_queue(client: httpx.Client, way: str, app: str, slash: str) -> None:
    reply = queue(client, way, "POST", f"{FLUX}{slash}", json=SMALL)
    assert reply.status_code == 200
    request = f"{app}/requests/{reply.json()['request_id']}"
    followed = events(queue(client, way, "GET", f"{request}/status/stream{slash}"))
    assert followed[-1]["status"] == "COMPLETED"
    status = queue(client, way, "GET", f"{request}/status{slash}")
    assert (status.status_code, status.json()["status"]) == (200, "COMPLETED")
    for form in (request, f"{request}/response"):
        result = queue(client, way, "GET", f"{form}{slash}")
        assert (result.status_code, result.json()["seed"]) == (200, 5)
    cancelled = queue(client, way, "PUT", f"{request}/cancel{slash}")
    assert (cancelled.status_code, cancelled.json()["status"]) == (400, "ALREADY_COMPLETED")


@by_every_way
def test_urls_of_a_request(client: httpx.Client, way: str) -> None:
    reply = queue(client, way, "POST", FLUX, json=SMALL).json()
    url = f"{base_for(client, way)}/fal-ai/flux/requests/{reply['request_id']}"
    for body in (reply, queue(client, way, "GET", f"fal-ai/flux/requests/{reply['request_id']}/status").json()):
        assert body["response_url"] == url
        assert body["status_url"] == f"{url}/status"
        assert body["cancel_url"] == f"{url}/cancel"


@by_every_way
def test_cancel_a_running_request(constrained_client: httpx.Client, gate: Gate, way: str) -> None:
    reply = queue(constrained_client, way, "POST", "test/gate", json={"prompt": str(gate.path)}).json()
    request = f"test/gate/requests/{reply['request_id']}"
    wait_until_claimed(constrained_client, f"/queue/{request}/status")
    cancelled = queue(constrained_client, way, "PUT", f"{request}/cancel")
    assert (cancelled.status_code, cancelled.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    gate.release(1)
    (*_, last) = events(queue(constrained_client, way, "GET", f"{request}/status/stream"))
    assert (last["status"], last["error_type"]) == ("COMPLETED", "client_cancelled")
    assert queue(constrained_client, way, "GET", request).status_code == 499


def test_one_base_url_without_a_prefix(client: httpx.Client) -> None:
    request_id = client.post(f"/queue/{FLUX}", json=SMALL).json()["request_id"]
    assert client.get(f"/fal-ai/flux/requests/{request_id}/status").json()["request_id"] == request_id


def test_proxy_passes_the_query_on(client: httpx.Client) -> None:
    request_id = client.post("/queue/test/null", json=SMALL).json()["request_id"]
    events(client.get(f"/queue/test/null/requests/{request_id}/status/stream"))
    target = f"https://queue.fal.run/test/null/requests/{request_id}/status?logs="
    for logs, kind in (("1", list), ("0", type(None))):
        status = client.get(PROXY, headers={"x-fal-target-url": f"{target}{logs}"}).json()
        assert isinstance(status["logs"], kind)


BAD_TARGETS = [
    "https://example.com/fal-ai/flux/dev",
    "http://fal.run/fal-ai/flux/dev",
    "https://fal.run.example.com/fal-ai/flux/dev",
    "https://fal.run@example.com/fal-ai/flux/dev",
    "https://127.0.0.1/fal-ai/flux/dev",
    "//fal.run/fal-ai/flux/dev",
    "/fal-ai/flux/dev",
    "file:///etc/passwd",
    "https://[fal.run/",
    "nonsense",
    "",
]


@pytest.mark.parametrize("target", BAD_TARGETS)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
def test_proxy_refuses_other_targets(client: httpx.Client, method: str, target: str) -> None:
    answer = client.request(method, PROXY, headers={"x-fal-target-url": target})
    assert (answer.status_code, answer.json()["error_type"]) == (400, "bad_request")
    assert "x-fal-target-url" in answer.json()["detail"]


def test_proxy_without_a_target(client: httpx.Client) -> None:
    answer = client.post(PROXY, json=SMALL)
    assert (answer.status_code, answer.json()["error_type"]) == (400, "bad_request")
    assert "x-fal-target-url" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["", "/", "/health", "/files/x.jpg", "/api/fal/proxy", "/openapi.json", "/unknown"])
def test_proxy_reaches_fals_paths_only(client: httpx.Client, path: str) -> None:
    answer = client.get(PROXY, headers={"x-fal-target-url": f"https://fal.run{path}"})
    assert answer.status_code == 404
    assert isinstance(answer.json()["detail"], str)


def test_target_header_means_nothing_elsewhere(client: httpx.Client) -> None:
    answer = client.post("/test/null", json=SMALL, headers={"x-fal-target-url": "https://queue.fal.run/fal-ai/other"})
    assert answer.json()["seed"] == 5


@with_and_without_slash
@pytest.mark.parametrize("path", ["/health", "/health/ready", "/docs", "/openapi.json"])
def test_the_servers_own_pages(client: httpx.Client, path: str, slash: str) -> None:
    assert client.get(f"{path}{slash}").status_code == 200


@with_and_without_slash
def test_image(client: httpx.Client, slash: str) -> None:
    url = client.post("/test/null", json=SMALL).json()["images"][0]["url"]
    assert client.get(f"{url}{slash}").headers["content-type"] == "image/jpeg"


def test_forwarded_headers_of_untrusted_clients_are_ignored(client: httpx.Client) -> None:
    answer = client.post("/test/null", json=SMALL, headers=FORWARDED)
    assert answer.json()["images"][0]["url"].startswith(f"http://127.0.0.1:{client.base_url.port}/files/")


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server that has a public URL and trusts a proxy on this machine."""
    settings = {"trusted_proxies": "127.0.0.1", "public_url": "https://flux.example.com/fal", "keys": "a:key"}
    with serving(tmp_path_factory.mktemp("proxied"), TEST_MODELS, **settings) as running:
        yield running.ready()


@pytest.fixture
def proxied_client(proxied: Server) -> Iterator[httpx.Client]:
    """Open a client of the server behind the proxy."""
    key = {"authorization": "Key a:key"}
    with httpx.Client(base_url=proxied.url, timeout=60, trust_env=False, headers=key) as client:
        yield client


def test_forwarded_headers_of_a_trusted_proxy(proxied_client: httpx.Client) -> None:
    answer = proxied_client.post("/test/null", json=SMALL, headers=FORWARDED).json()
    assert answer["images"][0]["url"].startswith("https://pics.example.com/flux/files/")
    reply = proxied_client.post("/queue/test/null", json=SMALL, headers=FORWARDED).json()
    assert reply["status_url"].startswith("https://pics.example.com/flux/queue/test/null/requests/")


def test_the_first_of_several_forwarded_values_counts(proxied_client: httpx.Client) -> None:
    headers = {"x-forwarded-proto": "https, http", "x-forwarded-host": "pics.example.com, inner"}
    answer = proxied_client.post("/test/null", json=SMALL, headers=headers).json()
    assert answer["images"][0]["url"].startswith("https://pics.example.com/files/")


@pytest.mark.parametrize("header", [{"x-forwarded-host": "a b"}, {"x-forwarded-proto": "gopher"}])
def test_malformed_forwarded_headers(proxied_client: httpx.Client, header: dict[str, str]) -> None:
    answer = proxied_client.post("/test/null", json=SMALL, headers=header)
    assert (answer.status_code, answer.json()["error_type"]) == (400, "bad_request")


@pytest.mark.parametrize(("name", "start"), [("x-forwarded-host", ""), ("x-forwarded-prefix", "/")])
def test_long_forwarded_headers(proxied_client: httpx.Client, name: str, start: str) -> None:
    """Limit these headers, because they become part of the base URL, which is stored with each request."""

    def answer(length: int) -> httpx.Response:
        headers = {**FORWARDED, name: start.ljust(length, "x")}
        return proxied_client.post("/queue/test/null", json=SMALL, headers=headers)

    assert answer(255).status_code == 200
    refused = answer(256)
    assert (refused.status_code, refused.json()["error_type"]) == (400, "bad_request")
    assert name.title() in refused.json()["detail"]
    assert "at most 255" in refused.json()["detail"]


def test_public_url_replaces_fals_names(proxied_client: httpx.Client) -> None:
    answer = proxied_client.post("/test/null", json=SMALL, headers={"host": "fal.run"}).json()
    assert answer["images"][0]["url"].startswith("https://flux.example.com/fal/files/")
    reply = proxied_client.post("/test/null", json=SMALL, headers={"host": "queue.fal.run"}).json()
    assert reply["status_url"].startswith("https://flux.example.com/fal/queue/test/null/requests/")


def test_public_url_is_a_name_of_this_server() -> None:
    """Accept the host of the public URL, and no other host, even if the server needs no key."""
    settings = Settings(data_dir=Path(), public_url="https://flux.example.com/fal")
    host_check = HostCheckMiddleware(PlainTextResponse("in"), settings, is_open=True)

    async def status(name: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(host_check)) as client:
            return (await client.get(f"http://{name}/", headers={"origin": f"https://{name}"})).status_code

    assert asyncio.run(status("flux.example.com")) == 200
    assert asyncio.run(status("other.example.com")) == 421
