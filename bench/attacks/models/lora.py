"""Model bench/lora: takes LoRA weights by URL, and generates without them."""

from models.flux_lora import FluxLoraInput
from tests.support.fake_models import NullEngine, NullModel


class LoraModel(NullModel):
    """Null model whose requests name LoRA weights."""

    Input = FluxLoraInput


MODEL = LoraModel("bench/lora", NullEngine)
