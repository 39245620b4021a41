"""test/hurry: makes the server wait only one second for a client that does not read."""

from server.net.timeouts import TimeoutProtocol
from tests.support.fake_models import GateEngine, NullModel

TimeoutProtocol.write_timeout = 1.0

MODEL = NullModel("test/hurry", GateEngine)
