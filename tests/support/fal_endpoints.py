"""What is known of fal's endpoints."""

import json
from typing import Any

from tests.support.server_process import ROOT

#: The inputs, by endpoint and field. A field without a default there is empty or false by default. Of the fields of
#: `fal-ai/flux-general`, only those that this server supports are there, and the default of `image_size` is ours.
FACTS: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "tests" / "support" / "fal_endpoints.json").read_text(encoding="utf-8")
)
