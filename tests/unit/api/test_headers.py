"""fal's lifecycle headers: how long a file is kept, and who may read it."""

import json
from typing import Any

import pytest
from starlette.datastructures import Headers

from server.api.headers import lifecycle
from server.errors import BadRequest
from server.storage.file_store import Lifecycle

NAMES = ["X-Fal-Object-Lifecycle-Preference", "X-Fal-Object-Lifecycle", "x-fal-object-lifecycle"]
#: What fal's SDKs make of the words "immediate", "1h", "1d", "7d", "30d" and "1y".
PRESETS = [60, 3600, 86_400, 604_800, 2_592_000, 31_536_000]


def asked(preference: Any, name: str = NAMES[0]) -> Lifecycle:
    """What this preference comes to."""
    return lifecycle(Headers({name: json.dumps(preference)}))


def refused(text: str) -> str:
    """What is said of this header."""
    with pytest.raises(BadRequest) as problem:
        lifecycle(Headers({NAMES[0]: text}))
    assert (problem.value.status, problem.value.error_type) == (400, "bad_request")
    return str(problem.value)


def test_nothing_said_is_the_operators_retention_and_no_secret() -> None:
    assert lifecycle(Headers({})) == Lifecycle(None, False)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_header_counts(name: str) -> None:
    preference = {"expiration_duration_seconds": 3600, "initial_acl": {"default": "forbid"}}
    assert asked(preference, name) == Lifecycle(3600.0, True)


def test_both_headers_with_one_meaning_as_fal_client_sends_them() -> None:
    text = json.dumps({"expiration_duration_seconds": 3600})
    assert lifecycle(Headers(dict.fromkeys(NAMES[:2], text))) == Lifecycle(3600.0)


def test_the_preference_wins_over_the_older_name() -> None:
    preference, older = ({"expiration_duration_seconds": seconds} for seconds in (60, 3600))
    headers = {NAMES[0]: json.dumps(preference), NAMES[1]: json.dumps(older)}
    assert lifecycle(Headers(headers)).lifetime == 60
    assert lifecycle(Headers({**headers, NAMES[0]: ""})).lifetime == 3600


@pytest.mark.parametrize("seconds", PRESETS)
def test_presets(seconds: int) -> None:
    assert asked({"expiration_duration_seconds": seconds}) == Lifecycle(float(seconds))


@pytest.mark.parametrize("given", [3600, 3600.0, "3600", " 3600 ", 3.6e3])
def test_seconds_in_every_spelling(given: object) -> None:
    assert asked({"expiration_duration_seconds": given}).lifetime == 3600
    assert asked(given).lifetime == 3600


@pytest.mark.parametrize("given", [None, 0, 0.0, "0"])
def test_none_and_zero_are_no_expiry_as_fals_own_client_says(given: object) -> None:
    assert asked({"expiration_duration_seconds": given}) == Lifecycle()


def test_other_fields_are_ignored() -> None:
    assert asked({"expiration_duration_seconds": 60, "media": {"x": 1}}) == Lifecycle(60.0)
    assert asked({}) == Lifecycle()


ACLS: list[tuple[Any, bool]] = [
    ({"default": "forbid"}, True),
    ({"default": "hide"}, True),
    ({"default": "allow"}, False),
    ({"default": "forbid", "rules": [{"user": "somebody", "decision": "allow"}]}, True),
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
    assert asked({"initial_acl": acl}, name) == Lifecycle(None, is_private)


@pytest.mark.parametrize(
    "acl", [{"default": "perhaps"}, {"default": 1}, {"default": ["forbid"]}, "FORBID", 1, ["hide"]]
)
def test_an_acl_that_is_not_understood_is_refused_rather_than_open(acl: object) -> None:
    assert "initial_acl" in refused(json.dumps({"initial_acl": acl}))


@pytest.mark.parametrize("seconds", ["-1", '"soon"', "true", "[60]", "{}", "NaN", "Infinity", "1e999", '"nan"', '""'])
def test_seconds_that_are_none_are_refused_by_name(seconds: str) -> None:
    assert "expiration_duration_seconds" in refused(f'{{"expiration_duration_seconds": {seconds}}}')


@pytest.mark.parametrize("text", ["{", "soon", "{'a': 1}", "[" * 100_000, "1" * 5000, "{}{}"])
def test_what_is_not_json_is_refused(text: str) -> None:
    assert "JSON" in refused(text)
