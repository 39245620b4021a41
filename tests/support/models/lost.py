"""test/lost: loses its device in the second step."""

from tests.support.fake_models import LostEngine, NullModel

MODEL = NullModel("test/lost", LostEngine)
