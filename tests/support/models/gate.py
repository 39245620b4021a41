"""test/gate: takes a step for each byte written to the named pipe in the prompt."""

from tests.support.fake_models import GateEngine, NullModel

MODEL = NullModel("test/gate", GateEngine)
