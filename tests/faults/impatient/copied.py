"""test/copied: test/copy, beside test/hurry."""

from tests.models.copy_of import CopyModel
from tests.null_model import CopyEngine

MODEL = CopyModel("test/copied", CopyEngine)
