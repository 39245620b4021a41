"""test/null: generates plain images at once, without weights."""

from tests.support.fake_models import NullEngine, NullModel

MODEL = NullModel("test/null", NullEngine)
