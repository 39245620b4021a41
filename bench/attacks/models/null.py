"""The model bench/null, which generates plain images at once. It also makes the server sweep old files more often."""

import server.app
from bench.attacks import SWEEP_SECONDS
from tests.support.fake_models import NullEngine, NullModel

# If the server renamed this variable, setting it would have no effect.
assert hasattr(server.app, "SWEEP_EVERY")
server.app.SWEEP_EVERY = SWEEP_SECONDS

MODEL = NullModel("bench/null", NullEngine)
