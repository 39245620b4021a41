"""test/gate: the model of tests/support/models, for servers that serve this directory."""

from tests.support.fake_models import GateEngine, NullModel

MODEL = NullModel("test/gate", GateEngine)
