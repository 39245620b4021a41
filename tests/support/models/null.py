"""test/null: served beside the real models in tests."""

from tests.support.fake_models import NullEngine, NullModel

MODEL = NullModel("test/null", NullEngine)
