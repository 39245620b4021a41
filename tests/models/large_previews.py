"""test/large-previews: served beside the real models in tests."""

from tests.null_model import LargePreviewEngine, NullModel

MODEL = NullModel("test/large-previews", LargePreviewEngine)
