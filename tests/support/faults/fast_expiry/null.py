"""test/null, in a server that deletes old data every second, not every minute: minutes of a test stand for days."""

import server.app
from tests.support.fake_models import NullEngine, NullModel

server.app.SWEEP_EVERY = 1.0

MODEL = NullModel("test/null", NullEngine)
