"""test/inpaint: returns the image it receives, red where its mask is white."""

from models.flux_dev import FluxDevImageToImageInput
from models.image_size import Size
from models.schema import ImageURL, Strength
from tests.support.fake_models import InpaintEngine, NullModel


class InpaintInput(FluxDevImageToImageInput):
    """A request to repaint the white part of a mask."""

    mask_url: ImageURL
    strength: Strength = 0.85
    image_size: Size | None = None


class InpaintModel(NullModel):
    """A model that takes an image URL and a mask URL."""

    Input = InpaintInput


MODEL = InpaintModel("test/inpaint", InpaintEngine)
