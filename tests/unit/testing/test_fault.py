"""Tests of the faults that a test can ask for: which fit together, and the errors that clients get."""

from typing import Any

import pytest
from pydantic import ValidationError

from server.errors import DiskFull, InternalError
from server.testing.fault import Fault


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "name at least one of hold, delay, status"),
        ({"times": 2, "endpoint": "a/b"}, "name at least one of hold, delay, status"),
        ({"status": 200}, "greater than or equal to 400"),
        ({"status": 600}, "less than or equal to 599"),
        ({"delay": -1}, "greater than or equal to 0"),
        ({"delay": 601}, "less than or equal to 600"),
        ({"delay": float("nan")}, "finite number"),
        ({"times": 0, "flag": True}, "greater than or equal to 1"),
        ({"webhook_copies": 11}, "less than or equal to 10"),
        ({"colour": 500}, "Extra inputs are not permitted"),
        ({"delay": 1, "message": "no"}, "need a status"),
        ({"delay": 1, "retry_after": 1}, "need a status"),
        ({"status": 429, "at": "result", "retry_after": 1}, "retry_after needs a status at submission"),
        ({"status": 429, "delay": 1}, "can have no other fault"),
        ({"status": 500, "at": "submission", "hold": True}, "can have no other fault"),
        ({"flag": True, "queue_position": 1}, "queue_position needs hold"),
    ],
)
def test_faults_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Fault.model_validate(fields)


@pytest.mark.parametrize("status", [401, 403, 404, 429])
def test_refused_at_the_submission(status: int) -> None:
    fault = Fault(status=status)
    assert fault.refuses
    assert fault.error().status == status
    assert not Fault(status=status, at="result").refuses


@pytest.mark.parametrize("status", [422, 499, 500, 502, 504])
def test_failed_with_the_result(status: int) -> None:
    fault = Fault(status=status)
    assert not fault.refuses
    assert fault.error().status == status
    assert Fault(status=status, at="submission").refuses


def test_a_retry_time_is_for_a_refusal() -> None:
    fault = Fault(status=503, retry_after=7)
    assert fault.refuses
    assert fault.error().headers["retry-after"] == "7"
    assert Fault(status=429, retry_after=0).error().headers["retry-after"] == "0"
    assert Fault(status=429).error().headers["retry-after"] == "5"
    assert Fault(status=500, retry_after=7).error().headers["retry-after"] == "7"
    assert "retry-after" not in InternalError.headers


def test_a_422_names_the_field() -> None:
    error = Fault(status=422, field="image_size", message="too large").error()
    assert error.body["detail"] == [
        {"type": "value_error", "loc": ["body", "image_size"], "msg": "too large", "input": ""}
    ]


@pytest.mark.parametrize(
    ("status", "error_type"),
    [(400, "bad_request"), (499, "client_cancelled"), (500, "internal_error"), (504, "request_timeout")],
)
def test_errors_have_the_servers_own_shape(status: int, error_type: str) -> None:
    assert Fault(status=status).error().body["error_type"] == error_type


def test_messages_reach_the_client() -> None:
    for status in (401, 403, 404, 429, 499, 500, 502, 504, 599):
        assert Fault(status=status, message="it broke").error().body["detail"] == "it broke"
    for status, message in [
        (400, "Bad Request"),
        (403, "Forbidden"),
        (405, "Method Not Allowed"),
        (502, "Bad Gateway"),
    ]:
        assert str(Fault(status=status).error()) == message
    assert isinstance(Fault(status=507).error(), DiskFull)
