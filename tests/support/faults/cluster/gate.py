"""test/gate: the same model as in tests/support/models, for servers with this models directory."""

from tests.support.fake_models import GateEngine, NullModel

MODEL = NullModel("test/gate", GateEngine)
