"""Tests of errors under /v1, which have OpenAI's shape wherever they come from."""

from typing import Any

import httpx
import pytest

from tests.support.server_process import Server

KEY = {"authorization": "Bearer alice:secret"}


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """Check that a response is an error with this status in OpenAI's shape; return the error."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] == answer.headers["x-fal-request-id"]
    assert answer.json().keys() == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    return error


@pytest.fixture
def http(keyless_client: httpx.Client) -> httpx.Client:
    """Return a client with a valid key."""
    keyless_client.headers.update(KEY)
    return keyless_client


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/images/upscale", "/v1/chat/completions", "/v1/models/x/y"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_unknown_paths(http: httpx.Client, method: str, path: str) -> None:
    if path == "/v1/models/x/y":
        # Every path below /v1/models is the name of a model.
        error = error_of(http.request(method, path), 404 if method == "GET" else 405)
        assert (error["code"], error["param"]) == (("model_not_found", "model") if method == "GET" else (None, None))
        return
    error = error_of(http.request(method, path), 404)
    assert error == {"message": error["message"], "type": "invalid_request_error", "param": None, "code": None}
    assert path.rstrip("/") in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/images/generations", "POST"),
        ("DELETE", "/v1/images/edits", "POST"),
        ("PUT", "/v1/images/variations", "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/test/null", "GET"),
    ],
)
def test_other_methods(http: httpx.Client, method: str, path: str, allowed: str) -> None:
    answer = http.request(method, path)
    assert error_of(answer, 405)["param"] is None
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"prompt": ', b'"x"', b"\xff"])
def test_bodies_that_are_no_object_have_no_param(http: httpx.Client, body: bytes) -> None:
    assert error_of(http.post("/v1/images/generations", content=body), 400)["param"] is None


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits", "/v1/images/variations"])
def test_a_wrong_key(keyless_client: httpx.Client, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer eve:secret"}, {"authorization": "Basic YTpi"}):
        answer = keyless_client.post(path, json={}, headers=headers)
        error = error_of(answer, 401)
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer, Key"


def test_errors_outside_the_routes(http: httpx.Client) -> None:
    assert error_of(http.post("/v1/images/generations", content=bytes(41 * 2**20)), 413)["code"] is None
    assert error_of(http.get("/v1/models", headers={"host": "a b"}), 400)["code"] == "bad_request"
    assert "control character" in error_of(http.get("/v1/models%00"), 404)["message"]


def test_a_foreign_host(client: httpx.Client) -> None:
    assert "--public-url" in error_of(client.get("/v1/models", headers={"host": "evil.example"}), 421)["message"]
    error = error_of(client.get("/v1/models", headers={"origin": "https://evil.example"}), 403)
    assert "--cors-origin" in error["message"]


def test_a_response_has_openais_request_id(http: httpx.Client) -> None:
    answer = http.post("/v1/images/generations", json={"prompt": "", "model": "test/null"})
    assert answer.headers["x-request-id"] == answer.headers["x-fal-request-id"]
    for path in ("/health", "/v1x", "/v1/models/requests/by-endpoint"):
        assert "x-request-id" not in http.get(path).headers


def test_a_refused_request_to_fals_platform_api(client: httpx.Client) -> None:
    """Refuse the request before its path is rewritten, in fal's shape nevertheless."""
    headers = {"host": "api.fal.ai", "origin": "https://evil.example"}
    answer = client.get("/v1/models", headers=headers)
    assert answer.status_code == 403
    assert "--cors-origin" in answer.json()["detail"]


def test_fals_paths_keep_fals_shape(http: httpx.Client, server_with_keys: Server) -> None:
    """Keep fal's shape for its platform API, also at the one path that works without /platform."""
    for answer in (
        http.get("/v1/models/requests/by-endpoint", params={"limit": 101}),
        http.get("/v1/models/pricing", headers={"host": "api.fal.ai"}),
        http.post("/test/unknown", json={}),
    ):
        assert "detail" in answer.json()
