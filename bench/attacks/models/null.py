"""bench/null: plain pictures at once, in a server that looks for old files more often."""

import server.app
from bench.attacks import SWEEP_SECONDS
from tests.support.fake_models import NullEngine, NullModel

# Under another name it would be set in vain, and no sweep be seen.
assert hasattr(server.app, "SWEEP_EVERY")
server.app.SWEEP_EVERY = SWEEP_SECONDS

MODEL = NullModel("bench/null", NullEngine)
