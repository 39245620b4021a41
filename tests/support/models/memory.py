"""test/memory: runs out of memory in each step."""

from tests.support.fake_models import MemoryEngine, NullModel

MODEL = NullModel("test/memory", MemoryEngine)
