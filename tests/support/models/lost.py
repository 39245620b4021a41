"""test/lost: served beside the real models in tests."""

from tests.support.fake_models import LostEngine, NullModel

MODEL = NullModel("test/lost", LostEngine)
