"""test/raises: served beside the real models in tests."""

from tests.null_model import NullModel, RaisesEngine

MODEL = NullModel("test/raises", RaisesEngine)
