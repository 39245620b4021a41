"""test/copy: served beside the real models in tests."""

from models.flux_dev_image_to_image import FluxDevImageToImageInput
from tests.support.fake_models import CopyEngine, NullModel


class CopyModel(NullModel):
    """Takes a picture by address."""

    Input = FluxDevImageToImageInput


MODEL = CopyModel("test/copy", CopyEngine)
