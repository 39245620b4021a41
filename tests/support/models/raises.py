"""test/raises: served beside the real models in tests."""

from tests.support.fake_models import NullModel, RaisesEngine

MODEL = NullModel("test/raises", RaisesEngine)
