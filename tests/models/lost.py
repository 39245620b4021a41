"""test/lost: served beside the real models in tests."""

from tests.null_model import LostEngine, NullModel

MODEL = NullModel("test/lost", LostEngine)
