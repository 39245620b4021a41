"""test/gate: the same as in tests/models, beside the faults."""

from tests.support.fake_models import GateEngine, NullModel

MODEL = NullModel("test/gate", GateEngine)
