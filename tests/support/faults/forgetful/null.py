"""test/null, in a server that forgets what is old every second: minutes of it stand for days."""

import server.app
from tests.support.fake_models import NullEngine, NullModel

server.app.SWEEP_EVERY = 1.0

MODEL = NullModel("test/null", NullEngine)
