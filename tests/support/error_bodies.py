"""fal's two shapes of an error, taken apart."""

from typing import Any

import httpx


def fields(answer: httpx.Response) -> dict[str, Any]:
    """The first entry of a 422 in fal's shape."""
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/json", answer.text
    assert "x-fal-request-id" in answer.headers, answer.text
    for entry in answer.json()["detail"]:
        assert isinstance(entry["loc"], list)
        assert isinstance(entry["msg"], str) and entry["msg"]
        assert isinstance(entry["type"], str)
        assert "url" not in entry
    first: dict[str, Any] = answer.json()["detail"][0]
    return first


def text(answer: httpx.Response, status: int) -> str:
    """The sentence of any other error in fal's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json", answer.text
    assert "x-fal-request-id" in answer.headers, answer.text
    detail = answer.json()["detail"]
    assert isinstance(detail, str) and detail
    assert answer.headers.get("x-fal-error-type") == answer.json().get("error_type")
    return detail
