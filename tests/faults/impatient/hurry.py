"""test/hurry: its server waits for no more than a second for a client that does not read."""

from server.net.timeouts import TimedProtocol
from tests.null_model import GateEngine, NullModel

TimedProtocol.answer_seconds = 1.0

MODEL = NullModel("test/hurry", GateEngine)
