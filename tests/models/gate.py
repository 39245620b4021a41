"""test/gate: served beside the real models in tests."""

from tests.null_model import GateEngine, NullModel

MODEL = NullModel("test/gate", GateEngine)
