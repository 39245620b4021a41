"""test/vary: takes an image without a prompt, and returns plain images of the requested size."""

from models.flux_dev import FluxDevReduxInput
from tests.support.fake_models import NullEngine, NullModel


class VaryModel(NullModel):
    """A model with the fields of Redux."""

    Input = FluxDevReduxInput


MODEL = VaryModel("test/vary", NullEngine)
