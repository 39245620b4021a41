"""test/copy: returns the image it receives."""

from models.flux_dev import FluxDevImageToImageInput
from tests.support.fake_models import CopyEngine, NullModel


class CopyModel(NullModel):
    """A model that takes an image URL."""

    Input = FluxDevImageToImageInput


MODEL = CopyModel("test/copy", CopyEngine)
