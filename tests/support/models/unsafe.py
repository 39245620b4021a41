"""test/unsafe: served beside the real models in tests."""

from tests.support.fake_models import NullModel, UnsafeEngine

MODEL = NullModel("test/unsafe", UnsafeEngine)
