"""Short-lived tokens for browsers, over a real socket."""

import time
from typing import Any

import httpx
import jwt
import pytest

from tests.support.error_bodies import error_message, first_field_error

ALICE = {"authorization": "Key alice:secret"}
#: The body that the SDKs send: the alias of the app, without its owner.
REQUEST: dict[str, Any] = {"allowed_apps": ["flux"], "token_expiration": 120}
WAYS = ["plain", "rest.fal.ai", "rest.alpha.fal.ai", "proxy"]
with_and_without_slash = pytest.mark.parametrize("slash", ["", "/"], ids=["plain", "slash"])


def request_token(client: httpx.Client, body: object, *, path: str = "/tokens/", way: str = "plain") -> httpx.Response:
    """Request a token with Alice's key, in one of the ways to reach fal's REST host."""
    if way == "proxy":
        headers = {**ALICE, "x-fal-target-url": f"https://rest.fal.ai{path}"}
        return client.post("/api/fal/proxy", json=body, headers=headers)
    host = {} if way == "plain" else {"host": way}
    return client.post(path, json=body, headers={**ALICE, **host})


def token_of(answer: httpx.Response) -> str:
    """Return the token of an answer: a bare JSON string, the only form that every SDK reads."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    token = answer.json()
    assert isinstance(token, str)
    assert answer.text == f'"{token}"'
    return token


def claims_of(token: str) -> dict[str, Any]:
    """Decode the claims of a token."""
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims


@pytest.mark.parametrize("way", WAYS)
@with_and_without_slash
def test_a_token_is_a_bare_string(keyless_client: httpx.Client, way: str, slash: str) -> None:
    token = token_of(request_token(keyless_client, REQUEST, path=f"/tokens{slash}", way=way))
    assert len(token.split(".")) == 3
    assert claims_of(token)["scope"].split() == ["flux"]


@with_and_without_slash
def test_tokens_without_keys_in_the_settings(constrained_client: httpx.Client, slash: str) -> None:
    token_of(constrained_client.post(f"/tokens{slash}", json=REQUEST))
    token_of(request_token(constrained_client, REQUEST))


@pytest.mark.parametrize("key", [{}, {"authorization": "Key nobody"}, {"authorization": "Bearer a.b.c"}])
@with_and_without_slash
def test_a_token_needs_a_key(keyless_client: httpx.Client, key: dict[str, str], slash: str) -> None:
    error_message(keyless_client.post(f"/tokens{slash}", json=REQUEST, headers=key), 401)


def test_a_token_cannot_request_tokens_or_images(keyless_client: httpx.Client) -> None:
    token = token_of(request_token(keyless_client, {"allowed_apps": ["flux", "null"]}))
    for scheme in ("Bearer", "Key"):
        headers = {"authorization": f"{scheme} {token}"}
        for path in ("/tokens/", "/test/null", "/queue/test/null"):
            error_message(keyless_client.post(path, json={"prompt": "x", **REQUEST}, headers=headers), 401)


def test_a_token_belongs_to_its_key_and_does_not_reveal_it(keyless_client: httpx.Client) -> None:
    bob = {"authorization": "Key bob:secret"}
    answers = [keyless_client.post("/tokens/", json=REQUEST, headers=headers) for headers in (ALICE, ALICE, bob)]
    first, second, other = (claims_of(token_of(answer)) for answer in answers)
    assert first["sub"] == second["sub"] != other["sub"]
    assert not {"alice", "secret"} & set(str(first).replace(":", "'").split("'"))


@pytest.mark.parametrize(("expiration", "seconds"), [(None, 120), (1, 1), (120, 120), (3600, 3600), ("60", 60)])
def test_a_token_expires_as_requested(keyless_client: httpx.Client, expiration: object, seconds: int) -> None:
    body = {"allowed_apps": ["flux"]} if expiration is None else {**REQUEST, "token_expiration": expiration}
    before = int(time.time())
    claims = claims_of(token_of(request_token(keyless_client, body)))
    assert before + seconds <= claims["exp"] <= int(time.time()) + seconds


def test_a_token_names_every_requested_app(keyless_client: httpx.Client) -> None:
    body = {"allowed_apps": ["flux", "null"], "token_expiration": 120, "ignored": True}
    assert claims_of(token_of(request_token(keyless_client, body)))["scope"].split() == ["flux", "null"]


BAD: list[tuple[Any, list[Any]]] = [
    ({}, ["body", "allowed_apps"]),
    ({"allowed_apps": []}, ["body", "allowed_apps"]),
    ({"allowed_apps": "flux"}, ["body", "allowed_apps"]),
    ({"allowed_apps": [5]}, ["body", "allowed_apps", 0]),
    ({"allowed_apps": None}, ["body", "allowed_apps"]),
    ({"allowed_apps": ["flux"] * 101}, ["body", "allowed_apps"]),
    ({**REQUEST, "token_expiration": 0}, ["body", "token_expiration"]),
    ({**REQUEST, "token_expiration": -1}, ["body", "token_expiration"]),
    ({**REQUEST, "token_expiration": 3601}, ["body", "token_expiration"]),
    ({**REQUEST, "token_expiration": 1e12}, ["body", "token_expiration"]),
    ({**REQUEST, "token_expiration": "soon"}, ["body", "token_expiration"]),
    ({**REQUEST, "token_expiration": None}, ["body", "token_expiration"]),
    ([], ["body"]),
    ("flux", ["body"]),
]


@pytest.mark.parametrize(("body", "loc"), BAD)
def test_a_bad_request_names_its_field(keyless_client: httpx.Client, body: object, loc: list[Any]) -> None:
    assert first_field_error(request_token(keyless_client, body))["loc"] == loc


@pytest.mark.parametrize("body", ["", "{", "{'allowed_apps': 1}"])
def test_broken_json(keyless_client: httpx.Client, body: str) -> None:
    assert first_field_error(keyless_client.post("/tokens/", content=body, headers=ALICE))["type"] == "json_invalid"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@with_and_without_slash
def test_only_post_makes_tokens(keyless_client: httpx.Client, method: str, slash: str) -> None:
    answer = keyless_client.request(method, f"/tokens{slash}", headers=ALICE)
    assert answer.status_code in (404, 405)
    assert isinstance(answer.json()["detail"], str)


def test_a_local_page_receives_a_token_and_a_foreign_page_does_not(constrained_client: httpx.Client) -> None:
    page, foreign = "http://localhost:3000", "https://evil.example"
    answer = constrained_client.post("/tokens/", json=REQUEST, headers={"origin": page})
    assert token_of(answer)
    assert answer.headers["access-control-allow-origin"] in ("*", page)
    error_message(constrained_client.post("/tokens/", json=REQUEST, headers={"origin": foreign}), 403)


def test_a_page_streams_from_every_path_of_the_stream_with_a_token(keyless_client: httpx.Client) -> None:
    """Accept the token also where a client adds /stream to a stream route, which fal lists as an endpoint."""
    token = token_of(request_token(keyless_client, {"allowed_apps": ["null"]}))
    other = token_of(request_token(keyless_client, {"allowed_apps": ["flux"]}))
    for path in ("/test/null/stream", "/test/null/stream/stream"):
        answer = keyless_client.post(path, json={"prompt": "x"}, params={"fal_jwt_token": token})
        assert answer.status_code == 200, answer.text
        assert '"has_nsfw_concepts"' in answer.text
        assert keyless_client.post(path, json={"prompt": "x"}, headers=ALICE).status_code == 200
        error_message(keyless_client.post(path, json={"prompt": "x"}, params={"fal_jwt_token": other}), 401)
    error_message(keyless_client.post("/test/none/stream", json={}, params={"fal_jwt_token": token}), 401)
