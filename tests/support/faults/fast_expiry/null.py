"""test/null: a server that imports this file deletes old data every second instead of every minute."""

import server.app
from tests.support.fake_models import NullEngine, NullModel

server.app.SWEEP_EVERY = 1.0

MODEL = NullModel("test/null", NullEngine)
