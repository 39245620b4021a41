"""test/hurry: limits the server's wait for a client that does not read to one second."""

from server.net.timeouts import TimeoutProtocol
from tests.support.fake_models import GateEngine, NullModel

TimeoutProtocol.write_timeout = 1.0

MODEL = NullModel("test/hurry", GateEngine)
