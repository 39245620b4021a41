"""test/large-previews: works like test/gate, with previews of several megabytes."""

from tests.support.fake_models import LargePreviewEngine, NullModel

MODEL = NullModel("test/large-previews", LargePreviewEngine)
