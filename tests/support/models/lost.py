"""test/lost: loses its device in the second step while the file in the prompt exists."""

from tests.support.fake_models import LostEngine, NullModel

MODEL = NullModel("test/lost", LostEngine)
