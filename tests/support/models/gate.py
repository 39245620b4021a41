"""test/gate: served beside the real models in tests."""

from tests.support.fake_models import GateEngine, NullModel

MODEL = NullModel("test/gate", GateEngine)
