"""The model bench/lora, which takes LoRA weights by URL and generates without them."""

from models.flux_lora import FluxLoraInput
from tests.support.fake_models import NullEngine, NullModel


class LoraModel(NullModel):
    """A null model whose requests name LoRA weights."""

    Input = FluxLoraInput


MODEL = LoraModel("bench/lora", NullEngine)
