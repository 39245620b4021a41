"""test/memory: served beside the real models in tests."""

from tests.null_model import MemoryEngine, NullModel

MODEL = NullModel("test/memory", MemoryEngine)
