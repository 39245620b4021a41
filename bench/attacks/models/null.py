"""Model bench/null: plain images at once, in a server that sweeps old files more often."""

import server.app
from bench.attacks import SWEEP_SECONDS
from tests.support.fake_models import NullEngine, NullModel

# Setting a name that the server does not read would have no effect, and no sweep would be seen.
assert hasattr(server.app, "SWEEP_EVERY")
server.app.SWEEP_EVERY = SWEEP_SECONDS

MODEL = NullModel("bench/null", NullEngine)
