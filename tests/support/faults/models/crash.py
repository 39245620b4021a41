"""test/crash: makes the server die at the point named by $CRASH_AT."""

import os
from pathlib import Path

from tests.support.fake_models import NullEngine, NullModel
from tests.support.faults import points

if name := os.environ.get("CRASH_AT"):
    points.arm(name, Path(os.environ["CRASH_MARKER"]))

MODEL = NullModel("test/crash", NullEngine)
