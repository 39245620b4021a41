"""test/gate: the same as in tests/models, beside the faults."""

from tests.null_model import GateEngine, NullModel

MODEL = NullModel("test/gate", GateEngine)
