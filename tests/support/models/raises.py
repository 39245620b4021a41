"""test/raises: raises an error in the second step."""

from tests.support.fake_models import NullModel, RaisesEngine

MODEL = NullModel("test/raises", RaisesEngine)
