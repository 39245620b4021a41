"""Checks of fal's two error formats: a list of invalid fields (422), and a single message."""

from typing import Any

import httpx


def first_field_error(response: httpx.Response) -> dict[str, Any]:
    """Check that a response is a 422 with a list of invalid fields; return the first entry of the list."""
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/json", response.text
    assert "x-fal-request-id" in response.headers, response.text
    for entry in response.json()["detail"]:
        assert isinstance(entry["loc"], list)
        assert isinstance(entry["msg"], str) and entry["msg"]
        assert isinstance(entry["type"], str)
        assert "url" not in entry
    first: dict[str, Any] = response.json()["detail"][0]
    return first


def error_message(response: httpx.Response, status: int) -> str:
    """Check that a response is an error with this status and a single message; return the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json", response.text
    assert "x-fal-request-id" in response.headers, response.text
    detail = response.json()["detail"]
    assert isinstance(detail, str) and detail
    assert response.headers.get("x-fal-error-type") == response.json().get("error_type")
    return detail
