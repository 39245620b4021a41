"""test/lora: takes LoRA weights but does not use them."""

from models.flux_lora import FluxLoraInput
from tests.support.fake_models import NullEngine, NullModel


class LoraModel(NullModel):
    """A model that takes URLs of LoRA weights."""

    Input = FluxLoraInput


MODEL = LoraModel("test/lora", NullEngine)
