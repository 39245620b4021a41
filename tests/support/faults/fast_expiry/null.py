"""test/null, for a server that deletes old data every second, not every minute, so that minutes stand for days."""

import server.app
from tests.support.fake_models import NullEngine, NullModel

server.app.SWEEP_EVERY = 1.0

MODEL = NullModel("test/null", NullEngine)
