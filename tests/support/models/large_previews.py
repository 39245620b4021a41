"""test/large-previews: served beside the real models in tests."""

from tests.support.fake_models import LargePreviewEngine, NullModel

MODEL = NullModel("test/large-previews", LargePreviewEngine)
