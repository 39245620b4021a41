"""Tests of fal's lifecycle headers: how long a file is kept, and whether it is private."""

import json
from typing import Any

import pytest
from starlette.datastructures import Headers

from server.api.headers import lifecycle
from server.errors import BadRequest
from server.storage.file_store import Lifecycle

NAMES = ["X-Fal-Object-Lifecycle-Preference", "X-Fal-Object-Lifecycle", "x-fal-object-lifecycle"]
#: The seconds that fal's SDKs send for "immediate", "1h", "1d", "7d", "30d" and "1y".
PRESETS = [60, 3600, 86_400, 604_800, 2_592_000, 31_536_000]


def parsed(preference: Any, name: str = NAMES[0]) -> Lifecycle:
    """Return the lifecycle that the server reads from this preference."""
    return lifecycle(Headers({name: json.dumps(preference)}))


def rejection(text: str) -> str:
    """Return the message of the error that this header causes."""
    with pytest.raises(BadRequest) as error:
        lifecycle(Headers({NAMES[0]: text}))
    assert (error.value.status, error.value.error_type) == (400, "bad_request")
    return str(error.value)


def test_without_a_header_the_operators_retention_applies_and_files_are_public() -> None:
    assert lifecycle(Headers({})) == Lifecycle(None, False)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_header_is_read(name: str) -> None:
    preference = {"expiration_duration_seconds": 3600, "initial_acl": {"default": "forbid"}}
    assert parsed(preference, name) == Lifecycle(3600.0, True)


def test_fal_client_sends_the_same_preference_in_both_headers() -> None:
    text = json.dumps({"expiration_duration_seconds": 3600})
    assert lifecycle(Headers(dict.fromkeys(NAMES[:2], text))) == Lifecycle(3600.0)


def test_the_newer_header_overrides_the_older_one() -> None:
    preference, older = ({"expiration_duration_seconds": seconds} for seconds in (60, 3600))
    headers = {NAMES[0]: json.dumps(preference), NAMES[1]: json.dumps(older)}
    assert lifecycle(Headers(headers)).lifetime == 60
    assert lifecycle(Headers({**headers, NAMES[0]: ""})).lifetime == 3600


@pytest.mark.parametrize("seconds", PRESETS)
def test_presets(seconds: int) -> None:
    assert parsed({"expiration_duration_seconds": seconds}) == Lifecycle(float(seconds))


@pytest.mark.parametrize("seconds", [3600, 3600.0, "3600", " 3600 ", 3.6e3])
def test_seconds_as_a_number_or_a_string(seconds: object) -> None:
    assert parsed({"expiration_duration_seconds": seconds}).lifetime == 3600
    assert parsed(seconds).lifetime == 3600


@pytest.mark.parametrize("seconds", [None, 0, 0.0, "0"])
def test_none_and_zero_mean_no_expiry_as_in_fals_client(seconds: object) -> None:
    assert parsed({"expiration_duration_seconds": seconds}) == Lifecycle()


def test_other_fields_are_ignored() -> None:
    assert parsed({"expiration_duration_seconds": 60, "media": {"x": 1}}) == Lifecycle(60.0)
    assert parsed({}) == Lifecycle()


ACLS: list[tuple[Any, bool]] = [
    ({"default": "forbid"}, True),
    ({"default": "hide"}, True),
    ({"default": "allow"}, False),
    ({"default": "forbid", "rules": [{"user": "someone", "decision": "allow"}]}, True),
    ({"default": "allow", "rules": []}, False),
    ({"rules": []}, False),
    ({}, False),
    ("forbid", True),
    ("hide", True),
    ("allow", False),
    (None, False),
]


@pytest.mark.parametrize(("acl", "is_private"), ACLS)
@pytest.mark.parametrize("name", NAMES)
def test_forbid_and_hide_make_a_file_private(name: str, acl: object, is_private: bool) -> None:
    assert parsed({"initial_acl": acl}, name) == Lifecycle(None, is_private)


@pytest.mark.parametrize(
    "acl", [{"default": "perhaps"}, {"default": 1}, {"default": ["forbid"]}, "FORBID", 1, ["hide"]]
)
def test_an_unknown_acl_is_rejected_and_not_treated_as_public(acl: object) -> None:
    assert "initial_acl" in rejection(json.dumps({"initial_acl": acl}))


@pytest.mark.parametrize("seconds", ["-1", '"soon"', "true", "[60]", "{}", "NaN", "Infinity", "1e999", '"nan"', '""'])
def test_invalid_seconds_are_rejected_by_field_name(seconds: str) -> None:
    assert "expiration_duration_seconds" in rejection(f'{{"expiration_duration_seconds": {seconds}}}')


@pytest.mark.parametrize("text", ["{", "soon", "{'a': 1}", "[" * 100_000, "1" * 5000, "{}{}"])
def test_a_header_that_is_not_json_is_rejected(text: str) -> None:
    assert "JSON" in rejection(text)
