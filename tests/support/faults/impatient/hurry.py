"""test/hurry: its server waits for no more than a second for a client that does not read."""

from server.net.timeouts import TimeoutProtocol
from tests.support.fake_models import GateEngine, NullModel

TimeoutProtocol.write_timeout = 1.0

MODEL = NullModel("test/hurry", GateEngine)
