"""test/unsafe: has a safety checker that flags or fails, as the prompt says."""

from tests.support.fake_models import NullModel, UnsafeEngine

MODEL = NullModel("test/unsafe", UnsafeEngine)
