"""test/lora: served beside the real models in tests."""

from models.flux_lora import FluxLoraInput
from tests.support.fake_models import NullEngine, NullModel


class LoraModel(NullModel):
    """Takes LoRA weights by address."""

    Input = FluxLoraInput


MODEL = LoraModel("test/lora", NullEngine)
