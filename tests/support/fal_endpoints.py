"""What is known of fal's endpoints."""

import json
from typing import Any

from tests.support.server_process import ROOT


def _read(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((ROOT / "tests" / "support" / name).read_text(encoding="utf-8"))
    return found


#: The inputs, by endpoint and field. A field without a default there is empty or false by default. Of the fields of
#: `fal-ai/flux-general`, only those that this server supports are there, and the default of `image_size` is ours.
FACTS = _read("fal_endpoints.json")
#: The same of the objects in these inputs, by name and field.
PARTS = _read("fal_parts.json")
