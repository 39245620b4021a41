"""test/crash: its server dies at the point that the environment names."""

import os
from pathlib import Path

from tests.faults import points
from tests.null_model import NullEngine, NullModel

if name := os.environ.get("CRASH_AT"):
    points.arm(name, Path(os.environ["CRASH_MARKER"]))

MODEL = NullModel("test/crash", NullEngine)
