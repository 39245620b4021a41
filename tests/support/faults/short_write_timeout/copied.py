"""test/copied: test/copy under another name, for the server of test/hurry."""

from tests.support.fake_models import CopyEngine
from tests.support.models.copy_of import CopyModel

MODEL = CopyModel("test/copied", CopyEngine)
