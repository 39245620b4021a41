"""test/memory: served beside the real models in tests."""

from tests.support.fake_models import MemoryEngine, NullModel

MODEL = NullModel("test/memory", MemoryEngine)
