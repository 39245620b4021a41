"""test/unsafe: served beside the real models in tests."""

from tests.null_model import NullModel, UnsafeEngine

MODEL = NullModel("test/unsafe", UnsafeEngine)
