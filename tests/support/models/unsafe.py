"""test/unsafe: has a safety checker that flags every image or fails, depending on the prompt."""

from tests.support.fake_models import NullModel, UnsafeEngine

MODEL = NullModel("test/unsafe", UnsafeEngine)
