"""test/null: served beside the real models in tests."""

from tests.null_model import NullEngine, NullModel

MODEL = NullModel("test/null", NullEngine)
