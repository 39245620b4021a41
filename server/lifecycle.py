"""fal's X-Fal-Object-Lifecycle headers: how long a file is kept and who may read it."""

import json
import math
from collections.abc import Mapping
from typing import Any

from server.errors import BadRequest
from server.files import Lifecycle

#: Python's client sends both, JavaScript's one or the other; the preference is the newer name.
_NAMES = ("x-fal-object-lifecycle-preference", "x-fal-object-lifecycle")
#: What fal's access lists call a file that strangers may not read.
_PRIVATE = ("forbid", "hide")


def lifecycle(headers: Mapping[str, str]) -> Lifecycle:
    """What the headers ask for. Raises BadRequest for what cannot be understood."""
    text = next((headers[name] for name in _NAMES if headers.get(name)), None)
    if text is None:
        return Lifecycle()
    try:
        preference = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest("X-Fal-Object-Lifecycle-Preference is not JSON") from None
    if not isinstance(preference, dict):
        preference = {"expiration_duration_seconds": preference}
    return Lifecycle(_seconds(preference.get("expiration_duration_seconds")), _is_private(preference))


def _seconds(given: object) -> float | None:
    if given is None:
        return None
    # Zero stands for no expiry, as fal's own client says.
    return number(given, "X-Fal-Object-Lifecycle-Preference's expiration_duration_seconds") or None


def _is_private(preference: dict[str, Any]) -> bool:
    listed = preference.get("initial_acl")
    if listed is None:
        return False
    default = listed.get("default") if isinstance(listed, dict) else listed
    if default not in (*_PRIVATE, "allow", None):
        raise BadRequest("initial_acl's default should be allow, hide or forbid")
    return default in _PRIVATE


def number(given: object, name: str) -> float:
    """A number of 0 or more in a header or parameter. Raises BadRequest, naming it."""
    try:
        value = float(str(given))
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise BadRequest(f"{name} should be a positive number, not {str(given)[:50]!r}")
    return value
