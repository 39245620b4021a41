"""Web pages: which may use the server, what they may send and read, and the request id on every answer."""

from typing import Any
from uuid import UUID

import httpx
import pytest

PAGE = "http://localhost:3000"
FOREIGN = "https://evil.example"
PROXY = "/api/fal/proxy"
SENT = ["authorization", "content-type", "x-fal-target-url", "x-fal-queue-priority", "x-fal-request-timeout"]
READ = {"x-fal-request-id", "x-fal-request-timeout-type", "x-fal-error-type", "x-fal-billable-units"}
SMALL = {"prompt": "x", "seed": 5}
ALICE = {"authorization": "Key alice:secret"}

FOREIGN_HOSTS = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "notlocalhost",
    "192.168.1.5",
    "10.0.0.1",
    "0.0.0.0",
    "169.254.169.254",
    "[2001:db8::1]",
    "fal.run.evil.example",
]


def tokens(header: str) -> set[str]:
    return {token.strip().lower() for token in header.split(",")}


def preflight(client: httpx.Client, path: str, origin: str, method: str) -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": ",".join(SENT),
    }
    return client.options(path, headers=headers)


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_foreign_host(client: httpx.Client, host: str) -> None:
    for path in ("/health", "/test/null", PROXY, "/files/x.jpg"):
        answer = client.get(path, headers={"host": f"{host}:{client.base_url.port}"})
        assert answer.status_code == 421
        assert host in answer.json()["detail"]


@pytest.mark.parametrize("host", ["", "a b", "host:port", "[::1", "a/b", "user@127.0.0.1"])
def test_malformed_host(client: httpx.Client, host: str) -> None:
    answer = client.get("/health", headers={"host": host})
    assert (answer.status_code, answer.json()["error_type"]) == (400, "bad_request")


ORIGINS = [FOREIGN, "null", "http://localhost.evil.example", "https://127.0.0.1.evil.example", "http://192.168.1.5"]


@pytest.mark.parametrize("origin", ORIGINS)
def test_foreign_origin(client: httpx.Client, origin: str) -> None:
    answers = [
        client.post("/test/null", json=SMALL, headers={"origin": origin}),
        client.post("/test/null", content='{"prompt": "x"}', headers={"origin": origin, "content-type": "text/plain"}),
        preflight(client, PROXY, origin, "POST"),
    ]
    for answer in answers:
        assert answer.status_code == 403
        assert origin in answer.json()["detail"]
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", [PAGE, "http://127.0.0.1:8000", "http://app.localhost", "http://[::1]:5173"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
@pytest.mark.parametrize("path", [PROXY, f"{PROXY}/", "/fal-ai/flux/dev", "/queue/fal-ai/flux/requests/x/cancel"])
def test_preflight_of_a_page_on_this_machine(client: httpx.Client, path: str, method: str, origin: str) -> None:
    answer = preflight(client, path, origin, method)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] in ("*", origin)
    assert method.lower() in tokens(answer.headers["access-control-allow-methods"])
    assert set(SENT) <= tokens(answer.headers["access-control-allow-headers"])
    assert UUID(answer.headers["x-fal-request-id"])


def test_headers_a_page_may_read(client: httpx.Client) -> None:
    answer = client.post("/test/null", json=SMALL, headers={"origin": PAGE})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] in ("*", PAGE)
    assert tokens(answer.headers["access-control-expose-headers"]) >= READ


@pytest.mark.parametrize("origin", [PAGE, FOREIGN])
def test_any_page_may_show_an_image(client: httpx.Client, origin: str) -> None:
    url = client.post("/test/null", json=SMALL).json()["images"][0]["url"]
    answer = client.get(url, headers={"origin": origin, "range": "bytes=0-9"})
    assert answer.status_code == 206
    assert len(answer.headers.get_list("access-control-allow-origin")) == 1
    assert answer.headers["access-control-allow-origin"] in ("*", origin)


@pytest.mark.parametrize("origin", [PAGE, FOREIGN])
def test_with_keys_any_page_may_send_requests(keyless_client: httpx.Client, origin: str) -> None:
    assert preflight(keyless_client, PROXY, origin, "POST").headers["access-control-allow-origin"] in ("*", origin)
    answer = keyless_client.post("/test/null", json=SMALL, headers={"origin": origin, **ALICE})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] in ("*", origin)
    assert tokens(answer.headers["access-control-expose-headers"]) >= READ
    refused = keyless_client.post("/test/null", json=SMALL, headers={"origin": origin})
    assert (refused.status_code, refused.headers["access-control-allow-origin"] in ("*", origin)) == (401, True)


def test_with_keys_any_host_is_answered(keyless_client: httpx.Client) -> None:
    answer = keyless_client.post("/test/null", json=SMALL, headers={"host": "gpu.example:8000", **ALICE})
    assert answer.json()["images"][0]["url"].startswith("http://gpu.example:8000/files/")


#: One request for each status code.
BY_STATUS: dict[int, dict[str, Any]] = {
    200: {"method": "GET", "url": "/health"},
    400: {"method": "POST", "url": PROXY},
    403: {"method": "POST", "url": "/test/null", "headers": {"origin": FOREIGN}},
    404: {"method": "POST", "url": "/fal-ai/unknown"},
    405: {"method": "GET", "url": "/test/null"},
    413: {"method": "POST", "url": "/test/null", "content": b" " * (2**20 + 1)},
    421: {"method": "GET", "url": "/health", "headers": {"host": "evil.example"}},
    422: {"method": "POST", "url": "/test/null", "json": {}},
    500: {"method": "POST", "url": "/test/raises", "json": {"prompt": "x"}},
}
#: Status codes of requests that are refused before the origin of the page is checked, or because of it.
UNREADABLE = {403, 421}


@pytest.mark.parametrize("status", BY_STATUS)
def test_every_answer_has_a_request_id_and_is_json(constrained_client: httpx.Client, status: int) -> None:
    answer = constrained_client.request(**BY_STATUS[status])
    assert answer.status_code == status
    assert UUID(answer.headers["x-fal-request-id"])
    assert answer.headers["content-type"] == "application/json"
    assert status == 200 or answer.json()["detail"]


@pytest.mark.parametrize("status", sorted(BY_STATUS.keys() - UNREADABLE))
def test_every_answer_can_be_read_by_a_page(constrained_client: httpx.Client, status: int) -> None:
    request = {**BY_STATUS[status], "headers": {"origin": PAGE}}
    answer = constrained_client.request(**request)
    assert answer.status_code == status
    assert answer.headers.get("access-control-allow-origin") in ("*", PAGE)


def test_wrong_verb_names_the_right_one(client: httpx.Client) -> None:
    for path in ("/fal-ai/flux/dev", "/queue/fal-ai/flux/dev", "/fal-ai/flux/dev/stream"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["detail"]) == (405, "Method Not Allowed")
        assert "POST" in answer.headers["allow"]
